"""What Megatron-Core 0.19.2 needs to be told or given, beside what :mod:`.cpu` answers.

Each function names the upstream file that it answers. :func:`prepare` calls those that this process needs. On CUDA
with Transformer Engine and mamba_ssm these remain: :func:`register_symbols`, :func:`skip_helper_compilation` and
:func:`build_mtp_from_our_stack`, without which hybrids do not start; :func:`sum_shared_gradients`, without which what
ranks share is trained wrong; :func:`tie_output_layers_of_heads` and those of :mod:`.optimizer_state`, without which
checkpoints are not saved, loaded or right; and :func:`use_torch_gated_delta_rule` where flash-linear-attention is
missing.
"""

import copy
import importlib
import importlib.util
from typing import Any

import torch

from megatron_hybrid.layers.registry import LAYERS


def prepare(device: str, stack: type) -> list[str]:
    """Makes this process ready to build and train hybrid models. A second call changes nothing more.

    Args:
        device: ``cpu`` or ``cuda``.
        stack: The class that builds the layers of a pattern.

    Returns:
        One line for each thing that was replaced because a package is missing, to be shown to the user.
    """
    from megatron_hybrid import kernels
    from megatron_hybrid.patches import optimizer_state, router_losses

    notes = []
    register_symbols()
    skip_helper_compilation()
    build_mtp_from_our_stack(stack)
    tie_output_layers_of_heads()
    router_losses.log_router_losses_of_all_layers()
    optimizer_state.load_optimizers_of_other_expert_layouts()
    optimizer_state.save_no_empty_lists_of_main_parameters()
    optimizer_state.save_optimizer_buckets_in_place()
    optimizer_state.load_sharded_buckets_of_leaves()
    optimizer_state.load_momentum_of_sgd()
    shift_tokens_inside_documents()
    count_tokens_of_context_parallel_heads()
    optimizer_state.load_optimizers_of_other_schedules()
    sum_shared_gradients()
    if kernels.ssm_backend(device) == "torch":
        use_torch_mamba_kernels()
        notes.append("Mamba-2 kernels: plain PyTorch (mamba_ssm is not in use)")
    if not has_module("fla"):
        use_torch_gated_delta_rule()
    from megatron.core import optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER or optimizer.Adam.__module__.startswith("megatron_hybrid"):
        use_fused_adam_contract()
        notes.append("Adam: plain PyTorch (neither Transformer Engine nor Apex can be imported)")
    if device == "cpu":
        give_all_to_all_its_splits()
        gather_unequal_parts_over_gloo()
    return notes


def has_module(name: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def register_symbols() -> None:
    """Lets patterns contain all registered layers (core/models/hybrid/hybrid_layer_allocation.py:14)."""
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    for symbol in set(LAYERS) - Symbols.VALID_LAYERS:
        # name_sorted_valid_layer_symbols lists the class's attributes, not the set
        setattr(Symbols, f"LAYER_{ord(symbol)}", symbol)
        Symbols.VALID_LAYERS.add(symbol)


def skip_helper_compilation() -> None:
    """Does not rebuild the dataset index helpers (core/datasets/utils.py:20).

    The wheel ships them compiled, but not the Makefile that upstream's function calls.
    """
    import megatron.core.datasets.helpers_cpp  # noqa: F401  (missing: fail here, with its name)
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def build_mtp_from_our_stack(stack: type) -> None:
    """Builds multi-token-prediction layers with our stack (core/transformer/multi_token_prediction.py:1019).

    Upstream imports the name ``HybridStack`` there, at the time of building.
    """
    from megatron.core.models.hybrid import hybrid_block

    hybrid_block.HybridStack = stack


def tie_output_layers_of_heads() -> None:
    """Takes the weight from a tied output layer beside prediction heads (core/models/hybrid/hybrid_model.py:322).

    A last stage with heads has a copy of the embedding, which is the output layer's weight as well
    (core/models/common/language_module/language_module.py:350). Upstream's GPT model allocates no other there, the
    hybrid one does, though nothing uses it: optimizer state of vocabulary x hidden, a failure at the first save (:497)
    and checkpoints of one process that do not load.
    """
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    set_up = HybridModel.setup_embeddings_and_output_layer
    if hasattr(set_up, "wrapped"):
        return

    def setup_embeddings_and_output_layer(self: Any) -> None:
        if self.mtp_process and self.share_embeddings_and_output_weights:
            self.output_layer.weight = None  # as skip_weight_param_allocation leaves it
        set_up(self)

    setup_embeddings_and_output_layer.wrapped = set_up  # type: ignore[attr-defined]
    HybridModel.setup_embeddings_and_output_layer = setup_embeddings_and_output_layer


def sum_shared_gradients() -> None:
    """Sums gradients of marked parameters over tensor-parallel ranks (core/distributed/finalize_model_grads.py:416).

    A parameter with ``sequence_parallel`` set is the same on all ranks, each of which sees a share of its gradient.
    Upstream sums it under sequence parallelism alone, where norms are such; rows and scales that ranks of a hybrid
    layer have in common (layers/parts.py, ``shared_by_ranks``) are such without it, too. Upstream's own parameters set
    the mark from the configuration, so that nothing else changes.
    """
    # the package's attribute of this name is the function
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    upstreams = module._allreduce_non_tensor_model_parallel_grads
    if upstreams.__module__ != module.__name__:
        return

    def reduce_marked(model: list, config: Any, tp_group: Any = None) -> None:
        if not config.sequence_parallel:
            config = copy.copy(config)
            config.sequence_parallel = True
        upstreams(model, config, tp_group)

    module._allreduce_non_tensor_model_parallel_grads = reduce_marked


def shift_tokens_inside_documents() -> None:
    """Lets prediction heads look ahead inside packed documents (core/transformer/multi_token_prediction.py:238).

    Upstream shifts the tokens, labels and loss masks of a head document by document, where they are given as lengths
    (``thd``). Here they are given as the ids of whole samples: all is shifted, and what comes from the next document
    is zero, as upstream has it.
    """
    from megatron.core.transformer import multi_token_prediction as mtp

    by_lengths = mtp._roll_tensor_packed_seq
    if hasattr(by_lengths, "wrapped"):
        return

    def roll(tensor: Any, shifts: int, dims: int, packed_seq_params: Any, cp_group: Any = None) -> tuple[Any, Any]:
        if packed_seq_params.qkv_format == "thd":
            return by_lengths(tensor, shifts, dims, packed_seq_params, cp_group)
        shifted, _ = mtp.roll_tensor(tensor, shifts, dims, cp_group)
        ids = packed_seq_params.seq_idx
        last = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (0, 1), value=True)
        if cp_group is not None and cp_group.size() > 1:
            chunks, rank = last.chunk(2 * cp_group.size(), 1), cp_group.rank()
            last = torch.cat([chunks[rank], chunks[-1 - rank]], 1)
        shifted = shifted.masked_fill(last, 0)
        return shifted, shifted.sum()

    roll.wrapped = by_lengths  # type: ignore[attr-defined]
    mtp._roll_tensor_packed_seq = roll


def count_tokens_of_context_parallel_heads() -> None:
    """Divides a prediction head's loss by the tokens of whole samples (core/transformer/multi_token_prediction.py).

    ``process_mtp_loss`` divides by the rank's own tokens, which :func:`roll_tensor` counts behind the shift, and the
    gradients are averaged over context-parallel ranks: no mean over tokens, since the mask and the shift leave the
    ranks different numbers of them. Here the count of a mask is that of all ranks by their number. Under
    ``--calculate-per-token-loss`` the head's sum is scaled by the tokens before the shift, too, of this rank: the
    count is scaled so that the quotient is that of all ranks. Masks alone are floating-point tensors.
    """
    from megatron.core.transformer import multi_token_prediction as mtp
    from megatron.training.global_vars import get_args

    upstreams = mtp.roll_tensor
    if hasattr(upstreams, "wrapped"):
        return

    def roll(
        tensor: Any, shifts: int = -1, dims: int = -1, cp_group: Any = None, packed_seq_params: Any = None
    ) -> tuple[Any, Any]:
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

    roll.wrapped = upstreams  # type: ignore[attr-defined]
    mtp.roll_tensor = roll


def use_torch_mamba_kernels() -> None:
    """Lets upstream's MambaMixer run on our kernels (core/ssm/mamba_mixer.py:52-80).

    The names are replaced in that module alone: a stand-in ``mamba_ssm`` in ``sys.modules`` would be picked up
    by other libraries.
    """
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer.utils import (
        ensure_metadata_has_dp_cp_group,
        make_sharded_tensors_for_checkpoint,
    )

    from megatron_hybrid.kernels import ssm_kernels

    ours = ssm_kernels("cpu", "torch")

    class ExtendedRMSNorm(ours.gated_norm):  # type: ignore[name-defined]
        """As upstream's class of this name, which without mamba_ssm is not even a class."""

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True),
                prefix,
                {"weight": 0},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
            )

    def packing(for_inference_not_training: bool = True) -> tuple[bool, str | None]:
        return (False, "dynamic inference needs mamba_ssm") if for_inference_not_training else (True, None)

    names = {
        "HAVE_MAMBA_SSM": True,
        "MAMBA_HAS_STATE_DTYPE": False,
        "mamba_split_conv1d_scan_combined": ours.split_conv1d_scan,
        "mamba_chunk_scan_combined": ours.chunk_scan,
        "causal_conv1d_fn": ours.causal_conv1d,
        "RMSNormGated": ours.gated_norm,
        "ExtendedRMSNorm": ExtendedRMSNorm,
        "_check_mamba_sequence_packing_support": packing,
    }
    for name, value in names.items():
        if not hasattr(mamba_mixer, name):
            raise RuntimeError(f"megatron.core.ssm.mamba_mixer has no {name}: it has changed upstream")
        setattr(mamba_mixer, name, value)


def use_torch_gated_delta_rule() -> None:
    """Lets upstream's GatedDeltaNet run without flash-linear-attention (core/ssm/gated_delta_net/common.py:141).

    Upstream has a plain torch path but refuses to build without the package; the layers themselves must be
    built with ``deterministic_mode`` (see model/specs.py).
    """
    from megatron.core.ssm.gated_delta_net import common

    common.HAVE_FLA = True
    if common.l2norm is None:
        common.l2norm = lambda x, dim=-1, eps=1e-6: x * torch.rsqrt(x.square().sum(dim, keepdim=True) + eps)


def use_fused_adam_contract() -> None:
    """Gives the optimizers an Adam that counts steps per group (core/optimizer/distrib_optimizer.py:20-35).

    Without Apex and Transformer Engine upstream falls back to torch's Adam, whose checkpoints it cannot load:
    it gives all parameters one shared ``step`` tensor (:1025-1033).
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_hybrid.patches.adam import FusedAdam

    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def give_all_to_all_its_splits() -> None:
    """Turns the MoE dispatcher's splits into arrays on the CPU too (core/transformer/moe/moe_utils.py:1184).

    Upstream converts them only ``if tensor.is_cuda``; Gloo's ``all_to_all_single`` wants lists.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def gather_unequal_parts_over_gloo() -> None:
    """Gathers and reduce-scatters parts of unequal length (core/tensor_parallel/mappings.py:118, :159).

    Expert tensor parallelism with expert parallelism does so; NCCL can, Gloo refuses. Here both are an
    all-reduce of the whole.
    """
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_along_first_dim(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        whole = input_.new_zeros(sum(output_split_sizes), *input_.shape[1:])
        whole.split(output_split_sizes)[group.rank()].copy_(input_)
        torch.distributed.all_reduce(whole, group=group)
        return whole

    def reduce_scatter_along_first_dim(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim = gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim
