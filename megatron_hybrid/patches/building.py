"""Patches that hybrid models are built and trained with, on every device and with every package."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from megatron_hybrid.patches.patching import Patch, Table, Value

MTP = "megatron.core.transformer.multi_token_prediction"
NAME = "building"


def tie_output_layers_of_heads(set_up: Callable) -> Callable:
    """Takes the weight from a tied output layer beside prediction heads; marks the one that it shares.

    A last stage with heads has a copy of the embedding, which is the output layer's weight as well
    (core/models/common/language_module/language_module.py:350). Upstream's GPT model allocates no other there, the
    hybrid one does, though nothing uses it: optimizer state of vocabulary x hidden, a failure at the first save (:497)
    and checkpoints of one process that do not load.

    The embedding's weight then has two gradients on that stage: one is added to ``main_grad`` inside the output layer's
    product, the other by the parameter's hook, which upstream calls for a marked weight alone (:259 marks it where the
    model has one stage).
    """

    def setup_embeddings_and_output_layer(self: Any) -> None:
        if self.mtp_process and self.share_embeddings_and_output_weights:
            self.output_layer.weight = None  # as skip_weight_param_allocation leaves it
        set_up(self)
        if self.mtp_process and self.share_embeddings_and_output_weights:
            self.shared_embedding_or_output_weight().zero_out_wgrad = True

    return setup_embeddings_and_output_layer


def sum_shared_gradients(upstreams: Callable) -> Callable:
    """Sums gradients of marked parameters over tensor-parallel ranks.

    A parameter with ``sequence_parallel`` set is the same on all ranks, each of which sees a share of its gradient.
    Upstream sums it under sequence parallelism alone, where norms are such; rows and scales that ranks of a hybrid
    layer have in common (layers/parts.py, ``shared_by_ranks``) are such without it, too. Upstream's own parameters set
    the mark from the configuration, so that nothing else changes.
    """

    def reduce_marked(model: list, config: Any, tp_group: Any = None) -> None:
        if not config.sequence_parallel:
            config = copy.copy(config)
            config.sequence_parallel = True
        upstreams(model, config, tp_group)

    return reduce_marked


def shift_tokens_inside_documents(by_lengths: Callable) -> Callable:
    """Lets prediction heads look ahead inside packed documents.

    Upstream shifts the tokens, labels and loss masks of a head document by document, where they are given as lengths
    (``thd``). Here they are given as the ids of whole samples: all is shifted, and what comes from the next document
    is zero, as upstream has it.
    """

    def roll(tensor: Any, shifts: int, dims: int, packed_seq_params: Any, cp_group: Any = None) -> tuple[Any, Any]:
        from megatron.core.transformer import multi_token_prediction as mtp

        if packed_seq_params.qkv_format == "thd":
            return by_lengths(tensor, shifts, dims, packed_seq_params, cp_group)
        shifted, _ = mtp.roll_tensor(tensor, shifts, dims, cp_group)
        ids = packed_seq_params.seq_idx  # [b, s]
        last = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (0, 1), value=True)
        if cp_group is not None and cp_group.size() > 1:
            chunks, rank = last.chunk(2 * cp_group.size(), 1), cp_group.rank()
            last = torch.cat([chunks[rank], chunks[-1 - rank]], 1)  # [b, s / cp]
        shifted = shifted.masked_fill(last, 0)
        return shifted, shifted.sum()

    return roll


def count_tokens_of_context_parallel_heads(upstreams: Callable) -> Callable:
    """Divides a prediction head's loss by the tokens of whole samples.

    ``process_mtp_loss`` divides by the rank's own tokens, which ``roll_tensor`` counts behind the shift, and the
    gradients are averaged over context-parallel ranks: no mean over tokens, since the mask and the shift leave the
    ranks different numbers of them. Here the count of a mask is that of all ranks by their number. Under
    ``--calculate-per-token-loss`` the head's sum is scaled by the tokens before the shift, too, of this rank: the
    count is scaled so that the quotient is that of all ranks. Masks alone are floating-point tensors.
    """

    def roll(
        tensor: Any, shifts: int = -1, dims: int = -1, cp_group: Any = None, packed_seq_params: Any = None
    ) -> tuple[Any, Any]:
        from megatron.training.global_vars import get_args

        rolled, count = upstreams(tensor, shifts, dims, cp_group, packed_seq_params)
        if cp_group is None or cp_group.size() == 1 or not tensor.is_floating_point():
            return rolled, count
        unshifted = getattr(tensor, "unshifted_count", None)  # of the mask that the first head has shifted
        unshifted = tensor.sum() if unshifted is None else unshifted
        rolled.unshifted_count = unshifted
        counts = torch.stack([count, unshifted])
        torch.distributed.all_reduce(counts, group=cp_group)
        if get_args().calculate_per_token_loss:
            return rolled, counts[0] * unshifted / counts[1].clamp(min=1)
        return rolled, counts[0] / cp_group.size()

    return roll


def skip_helper_compilation(compile_helpers: Callable) -> Callable:
    """Does not rebuild the dataset index helpers.

    The wheel ships them compiled, but not the Makefile that upstream's function calls.
    """
    import megatron.core.datasets.helpers_cpp  # noqa: F401  (missing: fail here, with its name)

    return lambda: None


def building(stack: type, model: type) -> Table:
    """The table.

    Args:
        stack: The class that builds the layers of a pattern.
        model: The class of the whole model.
    """
    return Table(
        NAME,
        (
            Patch(
                "megatron.core.datasets.utils",
                "compile_helpers",
                skip_helper_compilation,
                "the wheel has the helpers compiled and no Makefile",
                "core/datasets/utils.py:20",
            ),
            Patch(
                "megatron.core.models.hybrid.hybrid_block",
                "HybridStack",
                Value(stack),
                "upstream imports this name where it builds a prediction head, and its stack has no layers of ours",
                "core/transformer/multi_token_prediction.py:1019",
                contract="build_mtp_from_our_stack",
            ),
            Patch(
                "megatron.training.models.hybrid",
                "HybridModel",
                Value(model),
                "upstream's builder imports this name, and its model cannot compute losses without the logits",
                "training/models/hybrid.py:14",
                contract="build_our_model",
            ),
            Patch(
                "megatron.core.models.hybrid.hybrid_model:HybridModel",
                "setup_embeddings_and_output_layer",
                tie_output_layers_of_heads,
                "a tied output layer beside prediction heads has a second weight, and saves fail",
                "core/models/hybrid/hybrid_model.py:322",
            ),
            Patch(
                MTP,
                "_roll_tensor_packed_seq",
                shift_tokens_inside_documents,
                "packed documents are given as ids, not as lengths",
                "core/transformer/multi_token_prediction.py:238",
            ),
            Patch(
                MTP,
                "roll_tensor",
                count_tokens_of_context_parallel_heads,
                "under context parallelism a head's loss is no mean over tokens",
                "core/transformer/multi_token_prediction.py:137",
            ),
            Patch(
                "megatron.core.distributed.finalize_model_grads",
                "_allreduce_non_tensor_model_parallel_grads",
                sum_shared_gradients,
                "gradients of what ranks share are summed under sequence parallelism alone",
                "core/distributed/finalize_model_grads.py:416",
            ),
        ),
    )
