"""Counted activation memory against the bytes that autograd keeps of the real layers (CPU, torch backend).

Tolerance: the tables leave out vectors of the size of parameters (A and D of the scan, scales of the fusion) and one
of the gated delta rule's chunks, whose first state needs no gradient: below 0.5% at these sizes. A missing tensor shows
as 1.5% or more, since the smallest line that grows with tokens times a width is that part of its layer.
"""

from typing import Any

import pytest

from tests.support.training import MOE, forget

# What the ranks run ---------------------------------------------------------------------------------

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


def kept_and_counted_by_layer(pattern: str, flags: str = "") -> list[tuple[int, int]]:
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


def kept_and_counted_of_model(pattern: str, flags: str = "") -> tuple[int, int]:
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
    mask = torch.ones(tokens.shape) if settings.fused_loss else None
    with Kept(built) as kept:
        built(tokens, positions, None, labels=tokens.roll(-1, 1), loss_mask=mask)
    parsed = patterns.parse(pattern)
    extra = beside_layers(parsed, stages(parsed, 1)[0], 0, sizes, layout, settings)
    return kept.bytes(), segment_activation_bytes(parsed.layers, sizes, layout, settings, extra)[0]


# Tests ----------------------------------------------------------------------------------------------

SHORT = "--micro-batch-size 2 --seq-length 332"  # no multiple of the scan's chunk of 128, or the delta rule's of 64
LONG = "--micro-batch-size 1 --seq-length 636"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
FULL = "--recompute-granularity full --recompute-method"
TP2, SP, CP2 = "--tensor-model-parallel-size 2", "--sequence-parallel", "--context-parallel-size 2"

ODD = "--mamba-num-heads 18 --intra-ssm-dim 192 --linear-num-key-heads 6 --linear-num-value-heads 6"
"""M, P and G have input projections of 1,362, 806 and 780 rows."""


def agree(found, symbols):
    """Of each layer: the rank that holds most; of experts the mean, since routing decides on each rank's share."""
    wrong = {}
    for symbol, *ranks in zip(symbols, *found, strict=True):
        kept = [bytes_kept for bytes_kept, _ in ranks]
        measured, counted = sum(kept) / len(kept) if symbol == "E" else max(kept), ranks[0][1]
        if abs(counted / measured - 1) > 0.005:
            wrong[symbol] = f"measured {measured}, counted {counted}"
    assert not wrong


@pytest.mark.parametrize(
    ("size", "pattern", "flags"),
    [
        (1, "*WMPEG-", SHORT),
        (1, "*WMPE-", LONG),  # twice as long: what grows with the square shows
        (1, "*WMPEG-", f"{LONG} --bf16"),
        (1, "MPG", f"{SHORT} {ODD} --bf16"),  # input projections are padded
        (2, "MPG", f"{SHORT} {ODD} {TP2} {SP} --hybrid-recompute ssm"),
        (1, "*-MP", f"{SHORT} --hidden-dropout 0.1 --position-embedding-type none"),
        (1, "*WP-E", f"{SHORT} --rotary-percent 0.5 --squared-relu --moe-shared-expert-gate"),
        (1, "*WMPE-", f"{SHORT} {SELECTIVE} core_attn mlp moe --hybrid-recompute ssm"),
        (1, "PE", f"{SHORT} {SELECTIVE} shared_experts --hybrid-recompute intra"),
        (2, "*WMPEG-", f"{SHORT} {TP2} {SP}"),
        (2, "*WMP-", f"{SHORT} {TP2} --bf16 --mamba-num-groups 1 --num-query-groups 1"),  # shared B, C and keys
        (2, "*WMPEG-", f"{SHORT} {CP2}"),
        (2, "*WP", f"{SHORT} {CP2} {SELECTIVE} core_attn"),
        (2, "M", f"{SHORT} {CP2} --hybrid-recompute ssm"),
        (2, "E", f"{SHORT} --expert-model-parallel-size 2 --moe-shared-expert-gate"),
        (2, "E", f"{SHORT} {TP2} {SP} --expert-tensor-parallel-size 1 --moe-shared-expert-gate --bf16"),
    ],
)
def test_layers(ranks, size, pattern, flags):
    agree(ranks(size).run(kept_and_counted_by_layer, pattern=pattern, flags=flags), pattern)


EQUAL_HEADS = "--intra-qk-dim 256"  # values as wide as queries: attention pads nothing, and keeps views


@pytest.mark.parametrize(
    "flags",
    [
        "--intra-preset hymba",
        "--intra-preset falcon-h1 --bf16",
        "--intra-preset diff-transformer",
        f"--intra-preset diff-transformer {EQUAL_HEADS}",
        "--intra-preset diff-mamba",
        f"{EQUAL_HEADS} --intra-window 64 --intra-sinks 4",
        f"{EQUAL_HEADS} --bf16",
        "--intra-scale gate",
        f"--intra-value shared {EQUAL_HEADS}",
        "--intra-value shared --hybrid-recompute ssm",
    ],
)
def test_designs_of_the_intra_layer_hybrid(ranks, flags):
    agree(ranks(1).run(kept_and_counted_by_layer, pattern="P", flags=f"{SHORT} {flags}"), "P")


ALL, FUSED = "*WMP-EG", "--loss-kernel fused"


@pytest.mark.parametrize(
    ("size", "pattern", "flags"),
    [
        (1, ALL, ""),
        (1, ALL[:-1], f"--bf16 {SELECTIVE} mlp"),
        (1, "*-MP/W-", "--untie-embeddings-and-output-weights"),
        (1, ALL, f"{FULL} uniform --recompute-num-layers 2"),
        (1, ALL, f"{FULL} block --recompute-num-layers 3"),
        (1, "*-MP/W-", f"{FULL} uniform --recompute-num-layers 1"),
        (2, ALL[:-1], f"{TP2} {SP}"),
        (2, "*WMP-", f"{TP2} {FULL} uniform --recompute-num-layers 2 --distribute-saved-activations"),
        (1, "*-", FUSED),
        (1, "M-/W-", f"{FUSED} --bf16 --untie-embeddings-and-output-weights"),
        (2, "*-", f"{FUSED} {TP2}"),
        (2, "*-/M-", f"{FUSED} {TP2} {SP} --mtp-num-layers 1 --bf16"),
        (2, "*-", f"{FUSED} {CP2} --bf16"),
    ],
)
def test_whole_models(ranks, size, pattern, flags):
    found = ranks(size).run(kept_and_counted_of_model, pattern=pattern, flags=f"{SHORT} {flags}")
    measured, counted = max(kept for kept, _ in found), found[0][1]
    assert counted == pytest.approx(measured, rel=0.005)
