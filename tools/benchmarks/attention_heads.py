"""Time and bytes a second of the way from a projection to the heads of attention, with RoPE and back, on CUDA.

    python tools/benchmarks/attention_heads.py [--json out.json]
    python tools/benchmarks/attention_heads.py --search

bf16, four samples of 8,192 tokens. Rows: the Triton kernel with its line of the table of configurations; Megatron's
split, copies and RoPE by torch's operations; a copy of the projection, as the speed that memory has. GB/s counts what
must move: each channel of Q, K and V read once and written once. ``--search`` times other lines of the table.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.benchmarks.timing import median_us, versions
from megatron_hybrid.kernels.columns import split_columns
from megatron_hybrid.kernels.head_columns import HeadColumns
from megatron_hybrid.kernels.qkv_rotation import split_and_rotate, turns_of

SAMPLES, TOKENS = 4, 8192
SHAPES = {
    "Llama 1B": (HeadColumns(8, 4, 1, 1, 64, 64), 0),
    "P 1B": (HeadColumns(1, 16, 4, 4, 72, 128), 4896),
}
"""Heads, and columns of the projection behind them. Of the latter, values stay where they are."""
SHOWN = 5
"""Lines of a search."""


class Case:
    """One projection and the gradients of its heads."""

    def __init__(self, heads: HeadColumns, behind: int):
        self.heads, self.behind = heads, behind
        x = torch.randn(TOKENS, SAMPLES, heads.columns + behind, device="cuda", dtype=torch.bfloat16)
        self.x = x.requires_grad_()
        rates = 1e4 ** -(torch.arange(0, heads.width, 2, device="cuda") / heads.width)
        angles = torch.arange(TOKENS, device="cuda")[:, None] * rates
        self.angles = angles.repeat(1, 2)[:, None, None]  # [s, 1, 1, d]

    def own(self) -> torch.Tensor:
        return split_columns(self.x, [self.heads.columns, self.behind])[0] if self.behind else self.x

    def moved(self, way: str) -> int:
        """Bytes."""
        h = self.heads
        width = h.group_columns if way == "backward" or not self.behind else (h.queries + h.keys) * h.width
        return 2 * 2 * TOKENS * SAMPLES * h.groups * width

    def ways(self, forward: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        """Forward and backward pass. A gradient of other columns is no part of the latter's work: there is none."""
        found = [t for t in forward() if t.requires_grad]
        gradients = [torch.randn_like(t) for t in found]
        return {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(found, self.x, gradients, retain_graph=True),
        }

    def ours(self) -> dict[str, Callable[[], Any]]:
        turns = turns_of(self.angles)
        return self.ways(lambda: split_and_rotate(self.own(), self.heads, turns, not self.behind))

    def upstreams(self) -> dict[str, Callable[[], Any]]:
        from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as rotate

        h = self.heads
        widths = [h.queries * h.width, h.keys * h.width, h.values * h.value_width]

        def forward() -> tuple[torch.Tensor, ...]:
            parts = self.own().unflatten(-1, (h.groups, -1)).split(widths, -1)
            sizes = (h.width, h.width, h.value_width)
            q, k, v = (p.reshape(TOKENS, SAMPLES, -1, size) for p, size in zip(parts, sizes, strict=True))
            return rotate(q, self.angles), rotate(k, self.angles), v

        return self.ways(forward)

    def copies(self) -> dict[str, Callable[[], Any]]:
        def copy(elements: int) -> Callable[[], Any]:
            source = torch.empty(elements, device="cuda", dtype=torch.bfloat16)
            return partial(torch.empty_like(source).copy_, source)

        return {way: copy(self.moved(way) // 4) for way in ("forward", "backward")}


def compare(case: Case) -> Iterator[dict[str, Any]]:
    for name, ways in {"Triton": case.ours(), "Megatron": case.upstreams(), "copy": case.copies()}.items():
        for way, run in ways.items():
            took = median_us(run, host_ahead=True)
            yield {"name": name, "way": way, "us": took, "gb_s": case.moved(way) / took / 1e3}


def search(case: Case) -> Iterator[dict[str, Any]]:
    from megatron_hybrid.kernels.triton import configs

    table: Any = configs.TABLE
    key = "rotary", "2"
    kept, timed = table[key], []
    for elements, warps in itertools.product((512, 1024, 2048, 4096, 8192), (1, 2, 4, 8)):
        if not 128 <= elements // warps <= 2048:
            continue
        table[key] = {"ELEMENTS": elements, "num_warps": warps}
        took = {way: median_us(run, host_ahead=True) for way, run in case.ours().items()}
        both = sum(took.values())
        moved = case.moved("forward") + case.moved("backward")
        timed.append({"way": "both", "line": table[key], "us": both, "gb_s": moved / both / 1e3, **took})
    table[key] = kept
    timed.sort(key=lambda row: row["us"])
    yield from timed[:SHOWN]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="look for the fastest line of the table")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("these kernels need a CUDA device, and torch sees none")
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "versions": versions(), "rows": []}
    print(f"{report['command']}\n{', '.join(f'{k} {v}' for k, v in report['versions'].items())}")
    for name, (heads, behind) in SHAPES.items():
        print(f"\n{name}: {heads}, {behind} columns behind them")
        for row in (search if options.search else compare)(Case(heads, behind)):
            report["rows"].append({"shape": name, **row})
            what = row.get("line") or row["name"]
            print(f"{row['way']:9} {row['us']:8.1f} us {row['gb_s']:7.0f} GB/s  {what}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
