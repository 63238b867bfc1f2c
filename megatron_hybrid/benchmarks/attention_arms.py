"""Ways to compute attention, on the shapes of the layers, timed and checked: for tools/benchmarks/attention.py.

FLOPs are those of visible pairs of queries and keys. A forward pass has two products, 2 (d + dv) a pair and head. A
backward pass has five, the scores computed again among them, 2 (3 d + 2 dv). Roofline: the time that the forward pass's
FLOPs, three times for both passes, take at the peak, or reading and writing each tensor once at the memory's speed,
whichever is longer, over the time measured.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_hybrid.kernels.attention import attention, attention_reference, kernel_for
from megatron_hybrid.kernels.attention_masks import document_starts

PEAK, BANDWIDTH = 989e12, 4.8e12
"""Of an H200: dense bf16 FLOP/s, bytes/s."""
TOLERANCE = 3e-2
"""Of the largest entry: bf16 rounds the weights and each product's inputs."""
BUDGET_S = 0.25
"""Of the timed repeats of one pass."""
Arm = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Attention of one layer."""

    name: str
    batch: int
    length: int
    heads: int
    groups: int
    qk: int
    value: int
    window: int | None = None
    sinks: int = 0
    document: int | None = None
    """Mean length of packed documents."""

    @property
    def scale(self) -> float:
        return self.qk**-0.5

    def with_length(self, batch: int, length: int) -> "Shape":
        return Shape(**(vars(self) | {"batch": batch, "length": length}))

    def documents(self, device: str = "cuda") -> Tensor | None:
        if self.document is None:
            return None
        generator = torch.Generator().manual_seed(0)
        ends = torch.rand(self.batch, self.length, generator=generator) < 1 / self.document
        return (ends.cumsum(1) - ends.int()).int().to(device)

    def pairs(self) -> float:
        """Visible pairs of queries and keys of one head, all samples together."""
        ids = self.documents("cpu")
        start = torch.zeros(self.batch, self.length).long() if ids is None else document_starts(ids).long()
        seen = torch.arange(self.length) - start + 1
        if self.window is not None:
            seen = seen.clamp(max=self.window) + (seen - self.window).clamp(0, self.sinks)
        return float(seen.sum())


def shapes(batch: int, length: int) -> list[Shape]:
    """The layers of the paper's models at 1B, and packed documents of 1,000 tokens on average."""
    full, intra = (batch, length, 32, 8, 64, 64), (batch, length, 16, 4, 72, 128)
    return [
        Shape("*", *full),
        Shape("P", *intra),
        Shape("W", *full, 512, 64),
        Shape("* packed", *full, document=1000),
        Shape("P packed", *intra, document=1000),
        Shape("W packed", *full, 512, 64, document=1000),
    ]


class Inputs(NamedTuple):
    """Tensors of a layer as they stand in the stack: [b, heads, s, width], stored as [s, b, heads, width]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor


def inputs(shape: Shape) -> Inputs:
    def make(heads: int, width: int) -> Tensor:
        made = torch.randn(shape.length, shape.batch, heads, width, device="cuda", dtype=torch.bfloat16)
        return made.permute(1, 2, 0, 3)

    q, k, v = make(shape.heads, shape.qk), make(shape.groups, shape.qk), make(shape.groups, shape.value)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), make(shape.heads, shape.value))


def arms(shape: Shape) -> dict[str, Arm]:
    """Those that could serve a shape, by name; the layers' own choice has a star."""
    masked, documents = shape.window is not None or shape.document is not None, shape.documents()

    def ours(prefer: Any) -> Arm:
        rule = shape.scale, shape.window, shape.sinks, 0, 0.0, documents
        return lambda q, k, v: attention(q, k, v, *rule, prefer)

    def served(prefer: Any) -> str:
        call: dict[str, Any] = {"masked": masked, "chunk": False, "widths": (shape.qk, shape.value), "dropout": 0.0}
        return kernel_for(prefer, dtype=torch.bfloat16, capability=torch.cuda.get_device_capability(), **call)

    found: dict[str, Arm] = {}
    for prefer in ("auto", "triton", "cudnn", "torch"):
        padded = " padded" if served(prefer) == "sdpa" and shape.qk != shape.value else ""
        names = [f"{served(prefer)}{padded}{star}" for star in ("*", "")]
        if not any(name in found for name in names):
            found[names[prefer != "auto"]] = ours(prefer)
    if not masked:
        found["flash padded" if shape.qk != shape.value else "flash"] = lambda q, k, v: _flash(shape, q, k, v)
        if find_spec("flash_attn") and find_spec("flash_attn.cute"):
            found["FlashAttention-4"] = lambda q, k, v: _flash_4(shape, q, k, v)
    return found


def _flash(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    width = max(shape.qk, shape.value)
    q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.scale, enable_gqa=True)
    return out[..., : shape.value]


def _flash_4(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=shape.scale, causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def measure(shape: Shape, name: str, arm: Arm, short: Arm) -> dict[str, Any]:
    """One row: errors at a short length by ``short``, which is the same arm there, and times, or why there are none."""
    row: dict[str, Any] = {"shape": shape.name, "batch": shape.batch, "length": shape.length, "arm": name}
    try:
        row["error"] = error_of(short, shape.with_length(2, 1024))
        if not row["error"] <= TOLERANCE:
            return row | {"refused": f"wrong by {row['error']:.1e}"}
        t = inputs(shape)
        pairs = shape.pairs() * shape.heads
        forward = 2 * (shape.qk + shape.value) * pairs
        both = forward + 2 * (3 * shape.qk + 2 * shape.value) * pairs
        with torch.no_grad():
            row |= _rates("forward", median_ms(lambda: arm(t.q, t.k, t.v)), forward, forward, _bytes(t, 1))
        took = median_ms(lambda: torch.autograd.grad(arm(t.q, t.k, t.v), t[:3], t.dy))
        return row | _rates("both", took, both, 3 * forward, _bytes(t, 3))
    except Exception as error:  # there is no kernel for it here: the others are measured
        return row | {"refused": (str(error).splitlines() or [type(error).__name__])[0]}


def _bytes(t: Inputs, times: int) -> float:
    """Each tensor once, as many as a pass reads and writes."""
    return times * sum(x.numel() * x.element_size() for x in t)


def _rates(what: str, ms: float, flops: float, least: float, moved: float) -> dict[str, float]:
    bound = max(least / PEAK, moved / BANDWIDTH)
    return {f"{what}_ms": ms, f"{what}_tflops": flops / ms / 1e9, f"{what}_roofline": 1e3 * bound / ms}


def median_ms(run: Callable[[], Any]) -> float:
    """On the device, after warm-up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    once = _timed(run)
    return statistics.median(_timed(run) for _ in range(max(5, min(50, int(1e3 * BUDGET_S / once)))))


def _timed(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def error_of(arm: Arm, shape: Shape) -> float:
    """Of the output and all gradients, relative to the largest entry of each in float64."""
    t, documents = inputs(shape), shape.documents()
    exact = [x.detach().double().requires_grad_() for x in t[:3]]
    out = arm(t.q, t.k, t.v)
    wanted = attention_reference(exact[0], exact[1], exact[2], shape.scale, shape.window, shape.sinks, 0, documents)
    found = out, *torch.autograd.grad(out, t[:3], t.dy)
    right = wanted, *torch.autograd.grad(wanted, exact, t.dy.double())
    pairs = [(g.detach().double(), w.detach()) for g, w in zip(found, right, strict=True)]
    return max(float((g - w).abs().max() / w.abs().max()) for g, w in pairs)
