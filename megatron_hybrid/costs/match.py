"""How the paper makes two architectures comparable: equal parameters, or equal training FLOPs.

Both ways of arXiv:2510.04800, section 3. P-match: as many blocks as come nearest the reference's parameters, on as many
tokens. F-match: the architecture stays, and trains on as many tokens as the reference's FLOPs pay for.
"""

from collections.abc import Callable

from megatron_hybrid.accounting.scan import Convention
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.costs.flops import training_flops_per_token
from megatron_hybrid.costs.parameters import model_parameters
from megatron_hybrid.pattern import MAX_LAYERS, Pattern


def match_parameters(reference: int, pattern_of: Callable[[int], Pattern], sizes: Sizes) -> int:
    """The number of blocks whose parameters are nearest the reference's: P-match.

    Parameters are active ones without embeddings, as the paper counts a mixture of experts
    (:attr:`ModelParameters.active_non_embedding`). They grow with the blocks; of two equally near the fewer are taken.

    Args:
        reference: Parameters to come near.
        pattern_of: The pattern of a number of blocks. Numbers that it refuses with a ValueError are skipped.

    Raises:
        ValueError: ``pattern_of`` refuses every number of blocks, or no number of them reaches the reference.
    """
    if reference < 1:
        raise ValueError(f"the reference has {reference} parameters; it must have some to be matched")
    refusal: ValueError | None = None
    nearest: tuple[int, int] | None = None
    for blocks in range(1, MAX_LAYERS + 1):
        try:
            pattern = pattern_of(blocks)
        except ValueError as error:
            refusal = error
            continue
        found = model_parameters(pattern, sizes).active_non_embedding
        if nearest is None or abs(found - reference) < nearest[0]:
            nearest = abs(found - reference), blocks
        if found >= reference:
            break
    else:
        if nearest is None:
            raise ValueError(f"no number of blocks makes a pattern: {refusal}")
        raise ValueError(
            f"{MAX_LAYERS} blocks of these sizes still have fewer than the reference's {reference} parameters; give "
            "the sizes of the model that is to be matched"
        )
    return nearest[1]


def match_flops(budget: float, pattern: Pattern, sizes: Sizes, convention: Convention = "paper") -> float:
    """The tokens that ``budget`` training FLOPs pay for: F-match.

    The budget is the reference's tokens times its :func:`training_flops_per_token`, in the same convention.
    """
    return budget / training_flops_per_token(pattern, sizes, convention)
