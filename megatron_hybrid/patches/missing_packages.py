"""Patches that stand in for packages that are not installed: mamba_ssm, flash-linear-attention, Apex and Transformer
Engine."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.kernels import SsmKernels, ssm_kernels
from megatron_hybrid.kernels.weight_gradient import accumulate
from megatron_hybrid.patches.adam import FusedAdam
from megatron_hybrid.patches.patching import Patch, Table, Value

MIXER = "megatron.core.ssm.mamba_mixer"
DELTA = "megatron.core.ssm.gated_delta_net.common"
LINEARS = "megatron.core.tensor_parallel.layers"
OPTIMIZER = "megatron.core.optimizer"
SHARDED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
GRADIENT_ACCUMULATION = "gradient accumulation in products"


def extended_norm(there: Any) -> type:
    """Upstream's class of this name, which without mamba_ssm is not even a class."""
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

    class ExtendedRMSNorm(ssm_kernels("cpu", "torch").gated_norm):  # type: ignore[misc]
        def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True),
                prefix,
                {"weight": 0},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
            )

    return ExtendedRMSNorm


def _packing(for_inference_not_training: bool = True) -> tuple[bool, str | None]:
    return (False, "dynamic inference needs mamba_ssm") if for_inference_not_training else (True, None)


def mamba_kernels(ours: SsmKernels) -> Table:
    """Upstream's MambaMixer on our kernels.

    Args:
        ours: Those of torch or of Triton.

    The names are replaced in that module alone: a stand-in ``mamba_ssm`` in ``sys.modules`` would be picked up by other
    libraries.
    """
    kernel = "one of our kernels"
    found: dict[str, tuple[Callable, str, int]] = {
        "HAVE_MAMBA_SSM": (Value(True), "upstream refuses to build the layer without the package", 93),
        "MAMBA_HAS_STATE_DTYPE": (Value(False), "an argument that our kernel does not have", 95),
        "mamba_split_conv1d_scan_combined": (Value(ours.split_conv1d_scan), kernel, 78),
        "mamba_chunk_scan_combined": (Value(ours.chunk_scan), kernel, 77),
        "causal_conv1d_fn": (Value(ours.causal_conv1d), kernel, 66),
        "RMSNormGated": (Value(ours.gated_norm), kernel, 92),
        "ExtendedRMSNorm": (extended_norm, "upstream's derives from the package's norm", 111),
        "_check_mamba_sequence_packing_support": (Value(_packing), "our kernels take packed documents", 1490),
    }
    rows = [
        Patch(MIXER, name, make, reason, f"core/ssm/mamba_mixer.py:{line}", contract="use_torch_mamba_kernels")
        for name, (make, reason, line) in found.items()
    ]
    return Table("our Mamba kernels", tuple(rows))


def _l2norm(there: Callable | None) -> Callable:
    return there or (lambda x, dim=-1, eps=1e-6: x * torch.rsqrt(x.square().sum(dim, keepdim=True) + eps))


def _delta(name: str, make: Callable, reason: str, line: int) -> Patch:
    upstream = f"core/ssm/gated_delta_net/common.py:{line}"
    return Patch(DELTA, name, make, reason, upstream, contract="use_torch_gated_delta_rule")


GATED_DELTA_RULE = Table(
    "gated delta rule in torch",
    (
        # the layers themselves must be built with deterministic_mode (layers/delta/module.py)
        _delta("HAVE_FLA", Value(True), "upstream has a torch path, and refuses to build without the package", 141),
        _delta("l2norm", _l2norm, "of the package; None without it", 51),
    ),
)


def _accumulate(x: Tensor, dy: Tensor, total: Tensor) -> None:
    """x [t, h], dy [t, n or more], total [n, h], in upstream's order."""
    accumulate(total, dy, x)


# for a total in fp32, and for one in the dtype of the product
_PRODUCTS = SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate, wgrad_gemm_accum_fp16=_accumulate)


def accumulate_where_there_is_a_buffer(linear: Callable) -> Callable:
    """Upstream's linear on a weight without ``main_grad``, which only its DDP makes: gradients as torch gives them."""

    @wraps(linear)  # with the attribute by which upstream warns once
    def applied(
        input: Tensor, weight: Tensor, bias: Tensor | None, gradient_accumulation_fusion: bool, *args: Any, **kw: Any
    ) -> Tensor:
        return linear(input, weight, bias, gradient_accumulation_fusion and hasattr(weight, "main_grad"), *args, **kw)

    return applied


def gradient_accumulation(apex: bool) -> Table:
    """Upstream's linears add weight gradients to ``main_grad`` inside the product, by torch instead of Apex.

    Args:
        apex: Upstream has found Apex's functions, whose place ours take: those know no padded gradients
            (layers/aligned_linear.py).
    """
    upstream, contract = "core/tensor_parallel/layers.py", "accumulate_in_products"
    reason = "a function of Apex's compiled part, which torch has too"
    rows = (
        Patch(
            LINEARS,
            "fused_weight_gradient_mlp_cuda",
            Value(_PRODUCTS),
            reason,
            f"{upstream}:51",
            adds=not apex,
            contract=contract,
        ),
        Patch(
            LINEARS,
            "_grad_accum_fusion_available",
            Value(True),
            "upstream's linears refuse without Apex",
            f"{upstream}:49",
            contract=contract,
        ),
        Patch(
            LINEARS,
            "linear_with_grad_accumulation_and_async_allreduce",
            accumulate_where_there_is_a_buffer,
            "the backward pass of a layer without DDP fails",
            f"{upstream}:755",
            contract=contract,
        ),
    )
    return Table(GRADIENT_ACCUMULATION, rows)


def lacks_fused_adam() -> bool:
    """Whether upstream has found neither Apex's nor Transformer Engine's Adam."""
    from megatron.core import optimizer

    return optimizer.USING_PYTORCH_OPTIMIZER or optimizer.Adam is FusedAdam


def _adam(module: str, name: str, value: Any, reason: str, line: int) -> Patch:
    upstream = f"core/optimizer/{'__init__' if module == OPTIMIZER else 'distrib_optimizer'}.py:{line}"
    return Patch(module, name, Value(value), reason, upstream, contract="use_fused_adam_contract")


# Upstream falls back to torch's Adam, and gives all parameters one shared `step` tensor (distrib_optimizer.py:1025)
FUSED_ADAM = Table(
    "Adam in torch",
    (
        _adam(OPTIMIZER, "Adam", FusedAdam, "torch's counts a step for each parameter, which does not load", 33),
        _adam(OPTIMIZER, "USING_PYTORCH_OPTIMIZER", False, "ours takes the arguments of Apex's", 35),
        _adam(SHARDED_OPTIMIZER, "Adam", FusedAdam, "the sharded optimizer asks for its class", 24),
        _adam(SHARDED_OPTIMIZER, "HAVE_APEX_OR_TE", True, "the sharded optimizer refuses torch's", 20),
        _adam(SHARDED_OPTIMIZER, "USING_APEX_OPTIMIZER", True, "its state is as Apex's: one step for each group", 22),
    ),
)
