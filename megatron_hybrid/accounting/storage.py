"""How many bytes a parameter takes: precisions, optimizer, and how gradient buffers are cut."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_hybrid.accounting.eight_bit import WEIGHT_COPIES, eight_bit_recipe
from megatron_hybrid.accounting.layout import Layout
from megatron_hybrid.accounting.refusals import refuse
from megatron_hybrid.accounting.sizes import setting

BYTES = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2, "fp8": 1, "uint8": 1}
"""By the names of Megatron's flags and of torch."""

NOT_COUNTED = {
    "use_megatron_fsdp": "fully sharded parameters",
    "use_custom_fsdp": "fully sharded parameters",
    "use_torch_fsdp2": "fully sharded parameters",
    "optimizer_cpu_offload": "optimizer state in host memory",
    "cpu_offloading": "tensors in host memory",
    "cpu_offloading_num_layers": "tensors in host memory",
    "use_layer_wise_distributed_optimizer": "whole layers on single ranks",
    "freeze_all_layers": "frozen parameters",
    "fp4": "4-bit copies of weights",
    "ddp_param_name_patterns_for_fp32_local_accumulation": "second gradients of some parameters",
}
"""Settings of Megatron whose memory this package does not know, and why."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes of one parameter, and the layout of gradient buffers."""

    parameter: int = 2
    eight_bit: int = 0
    """Of each weight whose products are in 8 bits, beside ``parameter``."""
    gradient: int = 4
    """In the buffer that micro-batches add up in."""
    main: int = 4
    """The optimizer's copy of the parameter; 0 where it works on the parameter itself."""
    moments: int = 8
    """Both together."""

    distributed: bool = False
    """The distributed optimizer: replicas share the optimizer's state."""
    optimizer_instances: int = 1
    """Parts of the replicas each of which has the whole state."""
    buckets_overlap: bool = False
    """Gradients are reduced bucket by bucket during the backward pass, else in one."""
    bucket_size: int | None = None
    """Parameters; None: Megatron's default."""
    buckets: int | None = None
    """Number of them, in place of a size."""
    pads_for_bandwidth: bool = False

    @property
    def optimizer(self) -> int:
        """Bytes of optimizer state of one parameter."""
        return self.main + self.moments

    @classmethod
    def from_args(cls, args: Any) -> "Storage":
        """Storage of Megatron's arguments, before or after they were validated; absent ones have Megatron's default.

        Raises:
            ValueError: A setting whose memory is not counted here.
        """
        get = partial(setting, args)
        _refuse_uncounted(args)
        parameter = 2 if get("bf16", False) or get("fp16", False) else 4
        distributed = bool(get("use_distributed_optimizer", False))
        optimizer = get("optimizer", "adam")
        if optimizer not in ("adam", "sgd"):
            raise ValueError(f"--optimizer {optimizer}: its memory is not counted here; adam and sgd are.")
        if optimizer == "sgd" and distributed:
            raise ValueError("--optimizer sgd --use-distributed-optimizer: Megatron shards Adam's state alone.")
        if optimizer == "adam":
            moments = _bytes(get("exp_avg_dtype", "fp32")) + _bytes(get("exp_avg_sq_dtype", "fp32"))
        else:
            moments = 4 if get("sgd_momentum", 0.9) else 0
        return cls(
            parameter=parameter,
            eight_bit=WEIGHT_COPIES if eight_bit_recipe(args) else 0,
            gradient=4 if parameter == 4 or _gradients_in_fp32(args) else 2,
            main=_main_bytes(args) if parameter == 2 else 0,
            moments=moments,
            distributed=distributed,
            optimizer_instances=get("num_distributed_optimizer_instances", 1),
            # core/distributed/distributed_data_parallel.py and training/training.py:1857
            buckets_overlap=bool(get("overlap_grad_reduce", False))
            and not get("overlap_param_gather_with_optimizer_step", False),
            bucket_size=get("ddp_bucket_size"),
            buckets=get("ddp_num_buckets"),
            pads_for_bandwidth=bool(get("ddp_pad_buckets_for_high_nccl_busbw", False)),
        )

    def bucket_elements(self, layout: Layout, parameters: int) -> int | None:
        """Parameters that fill a bucket; None: all are in one. Source: ``training/training.py:1552``.

        Args:
            parameters: On this rank.
        """
        if not self.buckets_overlap:
            return None
        if self.buckets is not None:
            return parameters // self.buckets
        return self.bucket_size or max(40_000_000, 1_000_000 * layout.dp * layout.cp)


def _refuse_uncounted(args: Any) -> None:
    refuse(args, NOT_COUNTED, "memory")
    for kind, tp in (("tensor", "tensor_model"), ("expert_tensor", "expert_tensor")):
        shards = getattr(args, f"{kind}_parallel_num_weight_shards", None)
        size = getattr(args, f"{tp}_parallel_size", None) or getattr(args, "tensor_model_parallel_size", None) or 1
        if shards is not None and shards != size:
            flag = f"--{kind.replace('_', '-')}-parallel-num-weight-shards {shards}"
            raise ValueError(f"{flag} on {size} tensor-parallel ranks is not counted here. Drop it from the plan.")


def _gradients_in_fp32(args: Any) -> bool:
    """For 16-bit parameters. Source: ``training/arguments.py:1182-1194``."""
    if getattr(args, "bf16", False):
        if getattr(args, "grad_reduce_in_bf16", False):
            return False
        if _bytes(getattr(args, "main_grads_dtype", None) or "fp32") == 4:
            return True
    return bool(getattr(args, "accumulate_allreduce_grads_in_fp32", False))


def _main_bytes(args: Any) -> int:
    """Of 16-bit parameters.

    The precision-aware optimizer is Transformer Engine's: of an fp32 main parameter it stores the 16 bits that its bf16
    one lacks (``store_param_remainders``, which is on by default; ``core/optimizer/__init__.py:575``).
    """
    full = _bytes(getattr(args, "main_params_dtype", None) or "fp32")
    remainders = getattr(args, "store_param_remainders", None)
    if not getattr(args, "use_precision_aware_optimizer", False) or full != 4 or not getattr(args, "bf16", False):
        return full
    return full if remainders is False else 2


def _bytes(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        raise ValueError(f"{dtype} is no precision that is counted here: they are {', '.join(BYTES)}.")
    return BYTES[name]
