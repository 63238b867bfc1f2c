"""GroupedExperts beside upstream's loop over the same experts."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

HIDDEN, WIDTH = 64, 32
AT_ONCE = {"_ExpertFFNBackward", "GroupedProductBackward"}
"""What stands behind the output of experts that are not looped over."""


@contextmanager
def grouped_everywhere(rows_for_own_product: float | None = None) -> Iterator[None]:
    """Grouped products wherever torch has them: on CPUs too, where they are its own loop, and in fp32.

    Args:
        rows_for_own_product: In place of ``module.ROWS_FOR_OWN_PRODUCT``; 0 for a product for each expert.
    """
    from megatron_hybrid.layers.moe import module

    asked = []

    def can_group(*args: Any) -> bool:
        asked.append(args)
        return True

    decides, rows = module.can_group, module.ROWS_FOR_OWN_PRODUCT
    module.can_group = can_group  # type: ignore[assignment]
    if rows_for_own_product is not None:
        module.ROWS_FOR_OWN_PRODUCT = rows_for_own_product  # type: ignore[assignment]
    try:
        yield
    finally:
        module.can_group, module.ROWS_FOR_OWN_PRODUCT = decides, rows
    assert asked, "no experts ran"


def losses_of_grouped(rows_for_own_product: float | None = None, **case: Any) -> list[tuple[float, float]]:
    """:func:`tests.support.training.losses` of products of all experts at once."""
    from tests.support.training import losses

    with grouped_everywhere(rows_for_own_product):
        return losses(**case)


def accumulated(rows_for_own_product: float, flags: str) -> set[bool]:
    """After a step of grouped products, whether the experts' gradients were added to ``main_grad`` there."""
    from tests.support.training import Run

    with grouped_everywhere(rows_for_own_product):
        run = Run("ME", flags)
        run.step()
    named = [pair for chunk in run.model for pair in chunk.named_parameters()]
    return {parameter.grad_added_to_main_grad for name, parameter in named if "local_experts" in name}


def errors(
    counts: list[int], device: str = "cpu", rows_for_own_product: float | None = None, **settings: Any
) -> tuple[bool, dict[str, float]]:
    """Both ways through the same experts and tokens, in a process group of one.

    Args:
        counts: Tokens of each expert.
        device: Where it runs; on a CPU with :func:`grouped_everywhere`.
        rows_for_own_product: As in :func:`grouped_everywhere`.
        settings: Of the TransformerConfig, by default bf16, gated and without biases.

    Returns:
        Whether all experts were computed at once, and the errors, relative to the largest entry of the loop's:
        ``output``, and the gradients of ``tokens``, of the ``probabilities`` (fp32, as a router gives them) and of each
        weight.
    """

    with grouped_everywhere(rows_for_own_product) if device == "cpu" else nullcontext():
        grouped, looped = _both(counts, device, settings)
    found = {}
    for (name, ours), (_, theirs) in zip(grouped, looped, strict=True):
        assert ours.shape == theirs.shape
        sizes = [t.detach().double().abs().flatten() for t in (ours - theirs, theirs)]
        wrong, right = (float(size.max()) if len(size) else 0.0 for size in sizes)
        found[name] = wrong / (right or 1.0)  # an expert without tokens has gradients of zero
    return type(grouped[0][1].grad_fn).__name__ in AT_ONCE, found


def _both(counts: list[int], device: str, settings: dict[str, Any]) -> list[list[tuple[str, Any]]]:
    """Outputs and gradients of GroupedExperts and of SequentialMLP."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_hybrid.layers.moe.module import GroupedExperts

    defaults = {
        "moe_ffn_hidden_size": WIDTH,
        "params_dtype": torch.bfloat16,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
    }
    config = TransformerConfig(
        num_layers=1,
        num_attention_heads=4,
        hidden_size=HIDDEN,
        num_moe_experts=len(counts),
        use_cpu_initialization=True,
        **{**defaults, **settings},
    )
    linears = MLPSubmodules(ColumnParallelLinear, RowParallelLinear)
    alone = torch.distributed.group.WORLD
    groups = ProcessGroupCollection(ep=alone, expt_tp=alone, expt_dp=alone)
    torch.manual_seed(0)
    looped, grouped = (
        kind(len(counts), config, linears, groups).to(device) for kind in (SequentialMLP, GroupedExperts)
    )
    grouped.load_state_dict(looped.state_dict())
    tokens = torch.randn(sum(counts), HIDDEN).to(device, config.params_dtype)
    probabilities, dy = torch.rand(sum(counts)).to(device), torch.randn_like(tokens)
    # The memory that grouped products get is not zero by luck: gradients of an expert without tokens must be written
    poison = [torch.full((2**n,), torch.nan, device=device) for n in range(10, 20)]
    del poison
    return [_gradients(experts, tokens, counts, probabilities, dy) for experts in (grouped, looped)]


def _gradients(experts: Any, tokens: Any, counts: list[int], probabilities: Any, dy: Any) -> list[tuple[str, Any]]:
    import torch

    tokens, probabilities = (t.clone().requires_grad_() for t in (tokens, probabilities))
    output, bias = experts(tokens, torch.tensor(counts), probabilities)
    assert bias is None
    output.backward(dy)
    weights = [(name, p.grad) for name, p in experts.named_parameters()]
    return [("output", output), ("tokens", tokens.grad), ("probabilities", probabilities.grad), *weights]
