"""FLOPs of convention ``model`` against torch's count of the products that real models run.

Everything is equal, not close. Three things differ between the count and the products that run on a CPU, and each is
added here by a formula of its own: plain products compute the masked half of triangular ones, which convention
``model`` leaves out; the convolution of M and P is no matrix product and goes uncounted; some backward passes compute
products again.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_hybrid.accounting.projection import padded_rows
from megatron_hybrid.accounting.scan import SSD_CHUNK, ssd_scan_flops
from megatron_hybrid.costs import (
    Sizes,
    attention_core_flops,
    layer_flops_per_token,
    sizes_of,
    training_flops_per_token,
)
from megatron_hybrid.kernels.attention import attention_reference
from megatron_hybrid.kernels.attention_masks import visible
from megatron_hybrid.kernels.ssd import ssd_chunk_scan
from megatron_hybrid.layers.delta.account import DELTA_CHUNK, delta_scan_flops
from megatron_hybrid.layers.intra.design import PRESETS
from megatron_hybrid.layers.registry import account
from megatron_hybrid.pattern import parse
from tests.support.single import build, same_groups
from tests.support.training import MOE, SIZES

# What the ranks run ---------------------------------------------------------------------------------


def model_counts(argv: list[str], batch: int) -> dict[str, Any]:
    """A whole model on random tokens, attention written out as plain products.

    Returns:
        ``forward`` and ``backward``, FLOPs by operator (``mm``, ``bmm``, ``convolution`` ...), and ``sizes``, the
        :class:`megatron_hybrid.costs.Sizes` of the command line.
    """
    torch.manual_seed(1)
    model, args = build(argv)
    length = args.seq_length
    tokens = torch.randint(0, args.vocab_size, (batch, length))
    positions = torch.arange(length).expand(batch, -1)
    return _count(lambda: model.train()(tokens, positions, None, labels=tokens).mean(), args)


def all_counts(layers: list[list[str]], models: list[list[str]], batch: int) -> list[dict[str, Any]]:
    """:func:`layer_counts` and :func:`model_counts` of many command lines, in order."""
    with same_groups():
        return [layer_counts(argv, batch) for argv in layers] + [model_counts(argv, batch) for argv in models]


def layer_counts(argv: list[str], batch: int) -> dict[str, Any]:
    """The only layer of a model, on random input; as :func:`model_counts`."""
    torch.manual_seed(1)
    model, args = build(argv)
    x = torch.randn(args.seq_length, batch, args.hidden_size, requires_grad=True)

    def forward() -> Any:
        y = model.decoder.layers[0].train()(hidden_states=x, attention_mask=None)
        return (y[0] if isinstance(y, tuple) else y).mean()

    return _count(forward, args)


def _count(forward: Callable[[], Any], args: Any) -> dict[str, Any]:
    from megatron_hybrid.layers.attention import module

    ahead, back = FlopCounterMode(display=False), FlopCounterMode(display=False)
    # The counter takes the CPU's fused attention for nothing; the readable reference runs the same products.
    with patch.object(module, "attention", _written_out):
        with ahead:
            loss = forward()
        with back:
            loss.backward()
    return {"forward": _by_operator(ahead), "backward": _by_operator(back), "sizes": sizes_of(args)}


def _written_out(
    q: Any, k: Any, v: Any, scale: Any, window: Any, sinks: int, offset: int, _: float, documents: Any, __: Any
):
    return attention_reference(q, k, v, scale, window, sinks, offset, documents)


def _by_operator(counter: Any) -> dict[str, int]:
    return {str(op).removeprefix("aten."): int(n) for op, n in counter.get_flop_counts()["Global"].items()}


# Tests ----------------------------------------------------------------------------------------------

BATCH = 2
LENGTH = 2 * SSD_CHUNK + 44
"""Two whole chunks and a shorter one."""
LONG = f"--seq-length {LENGTH} --max-position-embeddings {LENGTH}"


def command(pattern: str, *flags: str) -> list[str]:
    moe = MOE if "E" in pattern else ""
    train = "--micro-batch-size 1 --train-iters 1 --lr 1e-3"
    return f"{SIZES} {moe} {train} {' '.join(flags)} --hybrid-layer-pattern={pattern}".split()


def attention_widths(symbol: str, s: Sizes) -> list[tuple[int, int, int | None]]:
    """Of each attention in a layer: queries, values, and keys that a query sees at most."""
    if symbol in "*W":
        width = s.heads * s.head_dim
        return [(width, width, s.window + s.sinks if symbol == "W" else None)]
    if symbol == "P":
        d = s.of("P")
        seen = None if d.window is None else d.window + d.sinks
        return [(d.qk_dim, d.value_dim, seen)] * d.branches.count("attention")
    return []


def scans(symbol: str, s: Sizes) -> list[tuple[int, int, int]]:
    """Of each Mamba-2 scan in a layer: inner width, groups, state."""
    if symbol == "M":
        return [(s.mamba_heads * s.mamba_head_dim, s.mamba_groups, s.state_dim)]
    if symbol == "P":
        return [(s.of("P").ssm_dim, s.of("P").ssm_groups, s.of("P").state_dim)] * s.of("P").branches.count("mamba")
    return []


def delta(s: Sizes) -> tuple[int, int, int]:
    return s.delta_value_heads, s.delta_key_dim, s.delta_value_dim


def plain_cores(symbol: str, s: Sizes, length: int) -> float:
    """FLOPs per token of the cores when masked products are computed whole."""
    total = sum(2 * (qk + v) * length for qk, v, _ in attention_widths(symbol, s))
    total += sum(ssd_scan_flops(*scan, length, masked=False) for scan in scans(symbol, s))
    return total + (delta_scan_flops(*delta(s), length, masked=False) if symbol == "G" else 0)


def masked_cores(symbol: str, s: Sizes, length: int) -> float:
    total = sum(attention_core_flops(qk, v, length, seen) for qk, v, seen in attention_widths(symbol, s))
    total += sum(ssd_scan_flops(*scan, length) for scan in scans(symbol, s))
    return total + (delta_scan_flops(*delta(s), length) if symbol == "G" else 0)


def convolutions(symbol: str, s: Sizes) -> float:
    """FLOPs per token of the convolutions that are no products of torch's: four taps over x, B and C."""
    return sum(2 * 4 * (inner + 2 * groups * state) for inner, groups, state in scans(symbol, s))


def padding(symbol: str, s: Sizes) -> float:
    """FLOPs per token of the rows of zeros in the products of input projections (layers/aligned_linear.py)."""
    rows = account(symbol).linears(s)[0][1] if symbol in "MPG" else 0
    return 2 * s.hidden * (padded_rows(rows) - rows)


def computed_again(symbol: str, s: Sizes, length: int) -> float:
    """FLOPs per token of what the scan's hand-written backward computes again: all but the update of the state."""
    return sum(
        ssd_scan_flops(inner, groups, state, length, masked=False) - 2 * inner * state
        for inner, groups, state in scans(symbol, s)
    )


def check(found: dict, layers: str, flops_per_token: float, length: int) -> None:
    """The counted products of a forward and a backward pass are the costs, and what runs beside them."""
    sizes, tokens = found["sizes"], BATCH * length
    forward, backward = found["forward"], found["backward"]
    assert set(forward) <= {"mm", "bmm"}
    cores, halves, beside, padded, again = (
        sum(rule(symbol, sizes) for symbol in layers)
        for rule in (
            lambda c, s: plain_cores(c, s, length),
            lambda c, s: plain_cores(c, s, length) - masked_cores(c, s, length),
            convolutions,
            padding,
            lambda c, s: computed_again(c, s, length),
        )
    )
    # In fractions of a token sums of floats round; whole products do not: less than one of each is no difference.
    assert sum(forward.values()) == pytest.approx((flops_per_token + halves - beside + padded) * tokens, abs=0.5)
    assert forward.get("bmm", 0) == pytest.approx(cores * tokens, abs=0.5)
    assert backward["mm"] == 2 * forward["mm"]
    assert backward.get("bmm", 0) == pytest.approx((2 * cores + again) * tokens, abs=0.5)


LAYERS = [
    ("*", ""),
    ("*", "--kv-channels 12 --attention-output-gate"),
    ("W", ""),
    ("W", "--swa-window 200 --swa-sinks 64"),
    ("W", f"--swa-window {LENGTH} --swa-sinks 5"),
    ("M", ""),
    ("M", "--mamba-num-heads 6 --mamba-state-dim 12"),
    ("M", "--mamba-num-groups 1"),
    ("-", ""),
    ("E", ""),
    ("E", "--num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 20"),
    *(("P", f"--intra-preset {preset}") for preset in PRESETS),
    ("P", "--intra-value-dim 48 --intra-ssm-dim 64 --intra-window 20 --intra-sinks 3"),
    ("P", "--intra-scale gate --intra-fusion add --intra-output joint --intra-value shared"),
]


MODELS = [
    ("M*-WPE", ""),
    ("ME*-/W-/W-", "--untie-embeddings-and-output-weights"),  # two prediction heads
    ("P-/ME", ""),
]


@pytest.fixture(scope="module")
def counted(ranks):
    """Pattern and flags to what the real model runs."""
    layers, models = ([command(*case, LONG) for case in cases] for cases in (LAYERS, MODELS))
    found = ranks(1).run(all_counts, layers=layers, models=models, batch=BATCH)[0]
    return dict(zip(LAYERS + MODELS, found, strict=True))


def names(cases: list[tuple[str, str]]) -> list[str]:
    return [f"{pattern} {flags}".strip() for pattern, flags in cases]


@pytest.mark.parametrize("case", LAYERS, ids=names(LAYERS))
def test_a_layer_runs_the_products_that_are_counted(counted, case):
    found = counted[case]
    check(found, case[0], layer_flops_per_token(case[0], found["sizes"]), LENGTH)


@pytest.mark.parametrize("case", MODELS, ids=names(MODELS))
def test_a_model_runs_the_products_that_are_counted(counted, case):
    found, pattern = counted[case], parse(case[0])
    per_token = training_flops_per_token(pattern, found["sizes"]) / 3
    check(found, pattern.layers + pattern.mtp * pattern.mtp_depths, per_token, LENGTH)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_gated_delta_net_runs_the_products_that_are_counted(ranks, chunks):
    """In whole chunks: upstream's readable rule pads the last one. Its triangular inverse is not made of products."""
    length = chunks * DELTA_CHUNK
    flags = f"--seq-length {length} --max-position-embeddings {length} --linear-num-value-heads 8"
    found = ranks(1).run(layer_counts, argv=command("G", flags), batch=BATCH)[0]
    s, forward, backward = found["sizes"], found["forward"], found["backward"]
    tokens, cores = BATCH * length, plain_cores("G", found["sizes"], length)
    heads, key, value = delta(s)
    assert forward["bmm"] == cores * tokens
    # the convolution runs into the padding behind the last token, 3 tokens, and cuts them off
    taps = 2 * s.delta_conv_width * (2 * s.delta_key_heads * key + heads * value)
    assert forward["convolution"] == taps * BATCH * (length + 3)
    counted = layer_flops_per_token("G", s) - masked_cores("G", s, length) + cores + padding("G", s)
    assert forward["mm"] + forward["bmm"] + taps * tokens == pytest.approx(counted * tokens, abs=0.5)
    # The first state is zero and the last is not read: of three products with a state, two in the first chunk have
    # one gradient in place of two, and one in the last has none.
    unneeded = 4 * 2 * heads * key * value * BATCH * DELTA_CHUNK
    assert backward["bmm"] == 2 * forward["bmm"] - unneeded
    assert backward["mm"] == 2 * forward["mm"]  # the counter takes the convolution's backward for a dense one


# Cores alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 44, SSD_CHUNK, LENGTH])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_scan_runs_the_products_that_are_counted(length, groups):
    heads, width, state = 6, 5, 7
    inputs = (torch.randn(1, length, heads, width), torch.rand(1, length, heads), -torch.rand(heads))
    B, C = torch.randn(2, 1, length, groups, state)
    with FlopCounterMode(display=False) as counter:
        ssd_chunk_scan(*inputs, B, C, SSD_CHUNK)
    counted = length * ssd_scan_flops(heads * width, groups, state, length, masked=False)
    assert counter.get_total_flops() == pytest.approx(counted, abs=0.5)


def plain_scan(x, a, B, C, state, chunk):
    """The chunked scan with decays a [l, h] in torch's own products alone: x [l, h, p], B and C [l, g, n]."""
    heads, ys = x.shape[1] // B.shape[1], []
    for x_c, a_c, B_c, C_c in zip(*(t.split(chunk) for t in (x, a, B, C)), strict=True):
        sums = a_c.cumsum(0).T  # [h, q]
        decay = (sums[:, :, None] - sums[:, None, :]).exp().tril()
        scores = (C_c.transpose(0, 1) @ B_c.permute(1, 2, 0)).repeat_interleave(heads, 0)
        v, B_h, C_h = x_c.transpose(0, 1), *(t.transpose(0, 1).repeat_interleave(heads, 0) for t in (B_c, C_c))
        ys.append((decay * scores) @ v + sums.exp()[..., None] * (C_h @ state))
        kept = (sums[:, -1:] - sums).exp()[..., None] * v
        state = sums[:, -1:, None].exp() * state + B_h.mT @ kept
    return torch.cat(ys, 1).transpose(0, 1), state


def test_a_scan_of_torchs_own_products_costs_three_times_its_forward():
    """Nothing is computed again here; and it is the scan: the same as the project's."""
    length, heads, groups, width, state = LENGTH, 4, 2, 3, 5
    generator = torch.Generator().manual_seed(0)
    x, B, C = (
        torch.randn(length, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((heads, width), (groups, state), (groups, state))
    )
    dt = torch.rand(length, heads, generator=generator, dtype=torch.float64)
    A = -torch.rand(heads, generator=generator, dtype=torch.float64)
    first = torch.zeros(heads, state, width, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, last = plain_scan(x * dt[..., None], dt * A, B, C, first, SSD_CHUNK)
        forward = counter.get_total_flops()
        (y.sum() + last.sum()).backward()
    expected = length * ssd_scan_flops(heads * width, groups, state, length, masked=False)
    assert forward == pytest.approx(expected, abs=0.5)
    assert counter.get_total_flops() == 3 * forward
    ours = ssd_chunk_scan(*(t[None] for t in (x, dt)), A, B[None], C[None], SSD_CHUNK)
    # fp64, sums of 300 terms of either sign
    torch.testing.assert_close(y, ours[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("widths", [(8, 8), (4, 12)])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (9, 3), (50, 0), (LENGTH, 2)])
def test_attention_costs_the_share_of_plain_products_that_its_mask_leaves(widths, window, sinks):
    heads, (qk, value) = 4, widths
    q, k = torch.randn(2, 1, heads, LENGTH, qk)
    v = torch.randn(1, heads, LENGTH, value)
    with FlopCounterMode(display=False) as counter:
        attention_reference(q, k[:, :2], v[:, :2], 1.0, window, sinks)
    plain = counter.get_total_flops()
    assert plain == 2 * heads * (qk + value) * LENGTH**2
    mask = visible(LENGTH, LENGTH, window, sinks, 0, torch.device("cpu"))
    counted = LENGTH * attention_core_flops(heads * qk, heads * value, LENGTH, window and window + sinks)
    assert counted == pytest.approx(plain * int(mask.sum()) / LENGTH**2, rel=1e-12)  # float rounding alone
    if window is None:
        assert counted / plain == pytest.approx((LENGTH + 1) / (2 * LENGTH), rel=1e-12)
