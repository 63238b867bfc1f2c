"""What activation memory depends on beside sizes and layout: precision, implementation, recomputation."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_hybrid.accounting.eight_bit import eight_bit_recipe
from megatron_hybrid.accounting.loss_chunks import fuses_loss
from megatron_hybrid.accounting.refusals import refuse, refuse_dispatchers
from megatron_hybrid.accounting.sizes import setting

MODULES = ("core_attn", "mlp", "moe", "shared_experts")
"""Of --recompute-modules, those that are counted."""

NOT_COUNTED = {
    "fp4": "quantised activations",
    "cpu_offloading": "activations on the host",
    "fine_grained_activation_offloading": "activations on the host",
    "fp32_residual_connection": "an fp32 residual",
    "qk_layernorm": "norms of queries and keys",
    "attention_output_gate": "gates of attention",
    "quick_geglu": "a gate that is not SwiGLU",
    "use_te_activation_func": "another implementation of the activation",
    "activation_func_clamp_value": "copies that are clamped",
    "cuda_graph_impl": "memory pools of CUDA graphs",
    "enable_cuda_graph": "memory pools of CUDA graphs",
    "external_cuda_graph": "memory pools of CUDA graphs",
    "overlap_moe_expert_parallel_comm": "two micro-batches at a time",
    "delay_wgrad_compute": "inputs that are kept beyond the layer's backward pass",
    "defer_embedding_wgrad_compute": "inputs of the output head that are kept for the end of the step",
}
"""Settings of Megatron whose activation memory this package does not know, and why."""


@dataclass(frozen=True)
class Recompute:
    """What is computed again in the backward pass."""

    method: str | None = None
    """Of full recomputation, ``uniform`` or ``block``; None: there is none."""
    layers: int = 1
    """uniform: in each group; block: recomputed ones of each segment, one by one."""
    modules: frozenset[str] = frozenset()
    """core_attn, mlp, moe, shared_experts; ssm, intra (--hybrid-recompute)."""
    distribute: bool = False
    """Inputs of recomputed groups are split over the tensor-parallel ranks."""

    @classmethod
    def from_args(cls, args: Any) -> "Recompute":
        """As Megatron's arguments and ours say; absent ones have their default.

        Raises:
            ValueError: A module is not counted, or full recomputation has no method.
        """
        get = partial(setting, args)
        modules = set(get("hybrid_recompute", ()))
        if get("moe_layer_recompute", False):
            modules.add("moe")
        granularity = get("recompute_granularity")
        if granularity == "selective":
            chosen = get("recompute_modules", ["core_attn"])
            unknown = sorted(set(chosen) - set(MODULES))
            if unknown:
                raise ValueError(
                    f"--recompute-modules {' '.join(unknown)} is not counted here: counted are {' '.join(MODULES)}."
                )
            modules |= set(chosen)
        method = get("recompute_method") if granularity == "full" else None
        if granularity == "full" and method not in ("uniform", "block"):
            raise ValueError(f"--recompute-method {method}: full recomputation is uniform or block.")
        layers = get("recompute_num_layers", 1)
        return cls(method, layers, frozenset(modules), bool(get("distribute_saved_activations", False)))


SSM_KERNELS = ("triton", "mamba_ssm", "torch")
DEFAULT_SSM_KERNELS = {"cuda": "triton", "cpu": "torch"}
"""Device to the kernels that --ssm-kernels auto means there (``kernels/__init__.py``)."""


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
    """What activation memory depends on beside sizes and layout."""

    bytes_each: int = 2
    """Of an activation: 2 in bf16 and fp16, 4 in fp32."""
    device: str = "cuda"
    """``cpu`` or ``cuda``."""
    backend: str = "te"
    """``te`` or ``torch``."""
    eight_bit: str | None = None
    """Recipe of products in 8 bits (accounting/eight_bit.py); None: there are none."""
    ssm_kernels: str = "triton"
    """Of the scan on CUDA: ``triton``, ``mamba_ssm`` or ``torch``; on CPU it is torch's."""
    rope: bool = True
    rotary_percent: float = 1.0
    """Share of a head's channels that RoPE turns."""
    dropout: bool = False
    """Hidden states are dropped."""
    attention_kernel: str = "auto"
    """--attention-kernel."""
    capability: tuple[int, int] = (9, 0)
    """Of the GPUs: Hopper unless there is one here that says otherwise."""
    attention_dropout: float = 0.0
    """Probability with which attention scores are dropped."""
    packed: bool = False
    """Documents are kept apart."""
    fused_activation: bool = True
    """On CUDA, SwiGLU is one operation, routing probabilities included; squared ReLU with them likewise."""
    fused_loss: bool = True
    """Output head and loss are one function, which keeps gradients in place of the softmax."""
    recompute: Recompute = Recompute()

    @classmethod
    def from_args(cls, args: Any) -> "ActivationSettings":
        """As Megatron's arguments and ours say; ``auto`` is CUDA, and on CUDA Transformer Engine.

        Raises:
            ValueError: A setting is not counted.
        """
        get = partial(setting, args)
        device = get("device", "auto")
        device = "cuda" if device == "auto" else device
        backend = get("backend", "auto")
        kernels = get("ssm_kernels", "auto")
        _refuse(args, device)
        recompute = Recompute.from_args(args)
        return cls(
            bytes_each=2 if get("bf16", False) or get("fp16", False) else 4,
            device=device,
            ssm_kernels=DEFAULT_SSM_KERNELS[device] if kernels == "auto" else kernels,
            backend={"auto": "te" if device == "cuda" else "torch"}.get(backend, backend),
            eight_bit=eight_bit_recipe(args),
            rope=get("position_embedding_type", "learned_absolute") == "rope",
            rotary_percent=get("rotary_percent", 1.0),
            attention_kernel=get("attention_kernel", "auto"),
            capability=get("device_capability") or (9, 0),
            dropout=get("hidden_dropout", 0.1) > 0,
            attention_dropout=get("attention_dropout", 0.0),
            packed=bool(get("reset_attention_mask", False)),
            # without a gate nothing but the experts' weighted squared ReLU can be fused (core/transformer/mlp.py:280)
            fused_activation=get("bias_swiglu_fusion", True)
            if get("swiglu")
            else bool(get("use_fused_weighted_squared_relu")),
            fused_loss=fuses_loss(args),
            recompute=recompute,
        )


def _refuse(args: Any, device: str) -> None:
    get = partial(setting, args)
    refuse(args, NOT_COUNTED, "activation memory")
    refuse_dispatchers(args)
    if device == "cpu" and get("reset_attention_mask"):
        raise ValueError("--reset-attention-mask: activation memory of packed documents on CPU is not counted.")
    group, stages = get("microbatch_group_size_per_vp_stage"), get("pipeline_model_parallel_size", 1)
    if group not in (None, stages):
        raise ValueError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group}: schedules are those of groups of as many "
            f"micro-batches as there are stages, {stages}. Drop it from the plan."
        )
