"""What the ranks measure: bytes that real layers keep for their backward pass."""

from typing import Any

from tests.support.training import MOE

SIZES = """--hidden-size 256 --num-attention-heads 8 --group-query-attention --num-query-groups 2 --ffn-hidden-size 648
--max-position-embeddings 1024 --vocab-size 1000 --make-vocab-size-divisible-by 8 --swiglu --disable-bias-linear
--normalization RMSNorm --position-embedding-type rope --swa-window 96 --swa-sinks 16 --mamba-head-dim 32
--mamba-num-groups 2 --mamba-state-dim 48 --hidden-dropout 0 --attention-dropout 0 --linear-num-key-heads 4
--linear-num-value-heads 8 --linear-key-head-dim 24 --linear-value-head-dim 40
--train-iters 1 --lr 1e-3"""
EXPERTS = MOE.replace("--num-experts 4 --moe-router-topk 1", "--num-experts 8 --moe-router-topk 2").replace("24", "168")


class Kept:
    """Bytes of the storages that autograd keeps while this is entered, each once, parameters and buffers left out."""

    def __init__(self, module: Any):
        self._own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
        self._kept: dict[int, Any] = {}  # tensors themselves, so that no address is given out again

    def __enter__(self) -> "Kept":
        from torch.autograd.graph import saved_tensors_hooks

        self._hooks = saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.__exit__(*exc)

    def _pack(self, t: Any) -> Any:
        where = t.untyped_storage().data_ptr()
        if where not in self._own:
            self._kept.setdefault(where, t)
        return t

    def bytes(self, but: Any = None) -> int:
        """Without the storage of the tensor ``but``."""
        left_out = None if but is None else but.untyped_storage().data_ptr()
        return sum(t.untyped_storage().nbytes() for where, t in self._kept.items() if where != left_out)


def _built(pattern: str, flags: str) -> tuple[Any, Any]:
    import torch
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_hybrid.cli import arguments
    from megatron_hybrid.cli import flags as command_line
    from megatron_hybrid.model.build import model_config
    from tests.support.training import forget

    forget()
    sizes = SIZES.replace("--swiglu", "") if "--squared-relu" in flags else SIZES
    argv = f"{sizes} {EXPERTS if 'E' in pattern else ''} {flags}".split() + [f"--hybrid-layer-pattern={pattern}"]
    args = arguments.parse(command_line.resolve(argv).argv, "cpu", print_config=True)
    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(args.seed)
    config = model_config(args)
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)
    torch.manual_seed(1)
    return (model.bfloat16() if args.bf16 else model).train(), args


def layers(pattern: str, flags: str = "") -> list[tuple[int, int]]:
    """For each layer of a pattern: bytes that this rank keeps of one micro-batch, and bytes that are counted."""
    import torch

    from megatron_hybrid.accounting.activation_settings import ActivationSettings
    from megatron_hybrid.accounting.layout import Layout
    from megatron_hybrid.costs import sizes_of
    from megatron_hybrid.costs.activations import layer_activation_bytes

    model, args = _built(pattern, flags)
    sizes, layout, settings = sizes_of(args), Layout.from_args(args), ActivationSettings.from_args(args)
    rows = args.seq_length // args.context_parallel_size
    rows //= args.tensor_model_parallel_size if args.sequence_parallel else 1
    found = []
    for symbol, layer in zip(pattern, model.decoder.layers, strict=True):
        x = torch.randn(rows, args.micro_batch_size, args.hidden_size, dtype=_dtype(args)).requires_grad_()
        with Kept(model) as kept:
            y = layer(hidden_states=x, attention_mask=None)
        y = y[0] if isinstance(y, tuple) else y
        # a layer's output is kept as the next one's input, and counted there
        found.append((kept.bytes(but=y), layer_activation_bytes(symbol, sizes, layout, settings)))
    return found


def _dtype(args: Any) -> Any:
    import torch

    return torch.bfloat16 if args.bf16 else torch.float32


def model(pattern: str, flags: str = "") -> tuple[int, int]:
    """Bytes that a whole model on one stage keeps of one micro-batch, and what is counted before recomputation."""
    import torch

    from megatron_hybrid import pattern as patterns
    from megatron_hybrid.accounting.activation_settings import ActivationSettings
    from megatron_hybrid.accounting.layout import Layout
    from megatron_hybrid.costs import sizes_of
    from megatron_hybrid.costs.activations import beside_layers, segment_activation_bytes
    from megatron_hybrid.costs.stages import stages

    built, args = _built(pattern, flags)
    sizes, layout, settings = sizes_of(args), Layout.from_args(args), ActivationSettings.from_args(args)
    length = args.seq_length // args.context_parallel_size
    tokens = torch.randint(0, 1000, (args.micro_batch_size, length))
    positions = torch.arange(length).expand_as(tokens)
    with Kept(built) as kept:
        built(tokens, positions, None, labels=tokens.roll(-1, 1))
    parsed = patterns.parse(pattern)
    extra = beside_layers(parsed, stages(parsed, 1)[0], 0, sizes, layout, settings)
    return kept.bytes(), segment_activation_bytes(parsed.layers, sizes, layout, settings, extra)[0]
