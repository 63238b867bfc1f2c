"""Searches the table of configurations of the Triton attention: for ``tools/benchmarks/attention.py --search``."""

from collections.abc import Iterator
from typing import Any

import torch

from megatron_hybrid.benchmarks.attention_arms import Shape, inputs, median_ms
from megatron_hybrid.kernels.attention import attention

# (queries, keys, warps, stages, most registers of a thread or 0)
LINES: dict[str, list[tuple[int, int, int, int, int]]] = {
    "attention_forward": [
        (128, 64, 8, 3, 0), (128, 64, 8, 2, 0), (128, 64, 8, 4, 0), (64, 64, 4, 3, 0), (128, 128, 8, 2, 0),
        (128, 128, 8, 3, 0), (128, 32, 8, 3, 0), (128, 64, 4, 3, 0), (256, 64, 8, 3, 0), (64, 128, 4, 2, 0),
    ],
    "attention_query_gradients": [
        (64, 64, 4, 3, 0), (64, 64, 4, 2, 0), (64, 32, 4, 3, 0), (128, 64, 8, 3, 0), (128, 32, 8, 3, 0),
        (128, 32, 8, 3, 128), (64, 32, 4, 3, 128), (128, 64, 8, 2, 0), (64, 128, 4, 2, 0),
    ],
    "attention_key_value_gradients": [
        (64, 64, 4, 3, 0), (64, 64, 4, 2, 0), (32, 64, 4, 3, 0), (32, 64, 4, 3, 168), (32, 64, 4, 2, 0),
        (64, 128, 8, 2, 0), (64, 128, 8, 3, 0), (32, 128, 8, 3, 0), (64, 64, 8, 3, 0), (128, 64, 8, 2, 0),
    ],
    "attention_sink_gradients": [(32, 64, 4, 3, 0), (32, 64, 4, 2, 0), (64, 64, 4, 3, 0), (64, 64, 8, 2, 0)],
}  # fmt: skip
"""Worth a try."""


def search(shape: Shape) -> Iterator[dict[str, Any]]:
    """Times each kernel's lines with the others as the table has them; prints the fastest three of each."""
    from megatron_hybrid.kernels.triton import configs
    from megatron_hybrid.kernels.triton.window_attention import shape_class

    t = inputs(shape)
    table: Any = configs.TABLE
    rule: Any = shape.scale, shape.window, shape.sinks, 0, 0.0, shape.documents(), "triton"
    print(f"{shape.name}, {shape.length} tokens, {shape.batch} samples")
    for kernel, lines in LINES.items():
        if kernel == "attention_sink_gradients" and not shape.sinks:
            continue
        key = kernel, shape_class(shape.qk, shape.value)
        kept = table[key]
        rows: list[dict[str, Any]] = []
        for line in lines:
            table[key] = _named(*line)
            try:
                if kernel == "attention_forward":
                    with torch.no_grad():
                        took = median_ms(lambda: attention(t.q, t.k, t.v, *rule))
                else:
                    out = attention(t.q, t.k, t.v, *rule)
                    took = median_ms(lambda out=out: torch.autograd.grad(out, t[:3], t.dy, retain_graph=True))  # type: ignore[misc]
                rows.append({"kernel": kernel, "shape": shape.name, "line": dict(table[key]), "ms": took})
            except Exception as error:  # too much shared memory, or no such block
                print(f"    {kernel} {line}: {(str(error).splitlines() or [''])[0][:80]}")
        table[key] = kept
        rows.sort(key=lambda row: row["ms"])
        for row in rows[:3]:
            print(f"    {key}: {row['line']},  # {row['ms']:.3f} ms".replace("'", '"'), flush=True)
        yield from rows


def _named(m: int, n: int, warps: int, stages: int, registers: int) -> dict[str, int]:
    line = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    return line | {"maxnreg": registers} if registers else line
