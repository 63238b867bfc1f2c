"""The Triton attention compiled for Hopper with the table's lines: registers suffice and products overlap."""

import pytest

from megatron_hybrid.kernels.triton import configs, window_attention_backward, window_attention_forward
from megatron_hybrid.kernels.triton.window_attention import CHUNK, parts, shape_class
from tests.support.triton_compiler import Resources, compiled

KERNELS = {
    "attention_forward": window_attention_forward.attention_forward,
    "attention_query_gradients": window_attention_backward.attention_query_gradients,
    "attention_sink_gradients": window_attention_backward.attention_sink_gradients,
    "attention_key_value_gradients": window_attention_backward.attention_key_value_gradients,
}
REGISTERS = 65536
"""Of a multiprocessor."""


def arguments(name, line, widths, window, documents, pack):
    """Those of one launch, by the names of the kernel's parameters."""
    m, n = line["BLOCK_M"], line["BLOCK_N"]
    d, e = (parts(width) for width in widths)
    packed = name in ("attention_forward", "attention_query_gradients")
    rows = (pack, m // pack) if packed else (1, m)
    blocks = {"q": (rows, d), "k": ((1, n), d), "v": ((1, n), e), "o": (rows, e), "do": (rows, e)}
    blocks |= {"dq": blocks["q"], "dk": blocks["k"], "dv": blocks["v"]}
    found = {
        f"{tensor}{i}": f"tensordesc<bf16[1, {heads}, {length}, {width}]>" if width else None
        for tensor, ((heads, length), tiles) in blocks.items()
        for i, width in enumerate(tiles)
    }
    found |= dict.fromkeys(("q", "o", "do"), "*bf16")
    found |= {f"{tensor}_{stride}": 64 for tensor in ("q", "o", "do") for stride in "bhs"}
    found |= {"D": widths[0], "E": widths[1]}
    sums = {"pk0": d[0], "pk1": d[1], "pv0": e[0], "pv1": e[1]}
    found |= {
        tensor: f"tensordesc<fp32[1, {n}, {width}]>" if width and window else None for tensor, width in sums.items()
    }
    found |= dict.fromkeys(("lse", "delta"), "*fp32" if packed else f"tensordesc<fp32[1, 1, {m}]>")
    found |= dict.fromkeys(("starts", "ends"), "*i32" if documents else "*fp32")
    found |= dict.fromkeys(("sq", "offset", "length", "window", "sinks", "heads", "groups", "row_stride"), 64)
    found |= dict.fromkeys(("scale", "score_scale"), 0.125)
    found |= {"WINDOW": window, "SINKS": window, "DOCUMENTS": documents, "PACK": pack, "CHUNK": CHUNK}
    return found | {"D0": d[0], "D1": d[1], "E0": e[0], "E1": e[1]} | line


def resources(name, widths, window, documents, pack=4) -> tuple[Resources, dict[str, int]]:
    line = configs.launch_options(name, shape_class(*widths))
    launch = {option: value for option, value in line.items() if option.islower()}
    return compiled(KERNELS[name], arguments(name, line, widths, window, documents, pack), launch), line


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("widths", [(64, 64), (72, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_spilled_and_products_overlap(name, widths, window, documents):
    if name == "attention_sink_gradients" and not window:
        pytest.skip("no window, no sinks")
    found, line = resources(name, widths, window, documents)
    assert found.spilled == 0
    assert not found.serialized
    assert "wgmma.mma_async" in found.ptx
    assert found.overwritten == []
    assert found.ptx.count("cp.async.bulk.tensor") >= 5
    assert "ld.global.b16" not in found.ptx and "ld.global.v2" not in found.ptx  # q, o and dy: by 16 bytes
    together = min(REGISTERS // (found.registers * 32 * line["num_warps"]), 227 * 1024 // (found.shared + 1024))
    assert together * line["num_warps"] >= 8  # two groups of warps take turns at the tensor cores


@pytest.mark.parametrize("widths", [(40, 24), (256, 256)], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_other_widths_and_heads_compile(name, widths):
    found = resources(name, widths, True, True, pack=1)[0]
    assert found.spilled == 0
    assert found.overwritten == []


@pytest.mark.parametrize("keys", [32, 64, 128])
@pytest.mark.parametrize("name", ["attention_forward", "attention_query_gradients"])
def test_the_assembler_overwrites_no_queries_whatever_the_block(name, keys, monkeypatch):
    line = {**configs.TABLE[name, "64"], "BLOCK_N": keys, "num_stages": 2}
    monkeypatch.setitem(configs.TABLE, (name, "64"), line)
    assert resources(name, (64, 64), False, False)[0].overwritten == []
