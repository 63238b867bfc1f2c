"""The Triton attention against the float64 reference, on the CPU by Triton's interpreter."""

import pytest
import torch

from megatron_hybrid.kernels.triton import configs, window_attention
from tests.support.attention_cases import TOLERANCE, errors, ids, inputs

pytestmark = pytest.mark.triton_interpreter

RULES = [(None, 0), (1, 0), (1, 1), (9, 0), (20, 3), (16, 16), (33, 40), (500, 5)]
"""Windows and sinks: smaller, equal to and larger than blocks and samples; sinks in no, one and several blocks."""
DOCUMENTS = {
    "one": None,
    "many": ids([1, 17, 32, 1, 1, 22], [74]),
    "ends-with-the-chunk": ids([32, 31, 1, 10], [31, 33, 10]),
}
# query heads and key heads: packed by 1, 2 and 4
HEADS = [(2, 2), (6, 2), (4, 1), (8, 2)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and chunks at sizes that the interpreter takes in a second."""
    for key in list(configs.TABLE):
        if key[0].startswith("attention"):
            rows = 16 if "key" in key[0] or "sink" in key[0] else 32
            line = {"BLOCK_M": rows, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
            monkeypatch.setitem(configs.TABLE, key, line)
    monkeypatch.setattr(window_attention, "CHUNK", 32)


def check(tensors, *rule, documents=None):
    found = errors(tensors, *rule, documents=documents)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[tensors[0].dtype]} == {}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("window", "sinks"), RULES)
def test_output_and_all_gradients(window, sinks, documents):
    check(inputs(2, (2, 1), 74, 0, (16, 16), torch.float32), window, sinks, 0, documents=DOCUMENTS[documents])


@pytest.mark.parametrize("documents", ["one", "many"])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (20, 3), (1, 40)])
@pytest.mark.parametrize(("sq", "offset"), [(1, 73), (37, 37), (20, 5)])
def test_a_part_of_the_queries(sq, offset, window, sinks, documents):
    """As under context parallelism and with caches; documents may go on behind the last query."""
    check(inputs(2, (2, 1), sq, offset, (16, 16), torch.float32), window, sinks, offset, documents=DOCUMENTS[documents])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("widths", [(8, 16), (16, 40), (24, 72), (72, 128)], ids=str)
def test_heads_and_widths(heads, widths):
    """Widths below, at and between powers of two; V wider than Q and K."""
    check(inputs(1, heads, 35, 0, widths, torch.float32), 9, 3, 0, documents=ids([20, 15]))


@pytest.mark.parametrize("length", [1, 2, 31, 33, 64])
def test_lengths(length):
    check(inputs(1, (2, 1), length, 0, (32, 16), torch.float32), 9, 3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (20, 3)])
def test_half_precision(window, sinks, dtype):
    tensors = inputs(2, (4, 2), 74, 0, (24, 32), dtype)
    check(tensors, window, sinks, 0, documents=DOCUMENTS["many"])


def test_what_lies_behind_the_last_query_is_not_read():
    q, k, v = inputs(1, (2, 1), 20, 10, (16, 16), torch.float32)
    rule = window_attention.Rule(0.25, 9, 2, 5)
    out = window_attention.window_attention(q, k[:, :, :25], v[:, :, :25], rule)
    k[:, :, 25:], v[:, :, 25:] = torch.nan, torch.inf
    assert torch.equal(window_attention.window_attention(q, k[:, :, :25], v[:, :, :25], rule), out)


def test_the_memory_order_is_the_stack_s():
    """No copy on the way to [s, b, heads x width], nor of the gradients."""
    tensors = [t.requires_grad_() for t in inputs(2, (4, 2), 10, 0, (16, 24), torch.float32)]
    out = window_attention.window_attention(*tensors, window_attention.Rule(0.25, 4, 2, 0))
    for t in (out, *torch.autograd.grad(out.square().sum(), tensors)):
        assert t.permute(2, 0, 1, 3).is_contiguous()


@pytest.mark.parametrize("stride", ["rows", "columns"])
def test_tensors_that_are_not_aligned_are_copied(stride):
    q, k, v = inputs(1, (2, 1), 20, 0, (16, 16), torch.float32)
    wide = torch.zeros(20, 1, 1, 33)
    wide[..., :16] = v.permute(2, 0, 1, 3)
    other = wide[..., :16].permute(1, 2, 0, 3) if stride == "rows" else v.transpose(2, 3).contiguous().transpose(2, 3)
    rule = window_attention.Rule(0.25, 9, 3, 0)
    whole, found = (window_attention.window_attention(q, k, t, rule) for t in (v, other))
    assert torch.equal(whole, found)


def test_a_gradient_that_is_one_number_for_all():
    q, k, v = (t.requires_grad_() for t in inputs(1, (2, 1), 20, 0, (16, 16), torch.float32))
    out = window_attention.window_attention(q, k, v, window_attention.Rule(0.25, 9, 3, 0))
    found = torch.autograd.grad(out.sum(), v, retain_graph=True)[0]
    assert torch.equal(found, torch.autograd.grad(out, v, torch.ones_like(out))[0])


def test_scales_of_zero_and_below_are_refused():
    tensors = inputs(1, (2, 1), 4, 0, (16, 16), torch.float32)
    with pytest.raises(ValueError, match="scale is -1 and must be above 0"):
        window_attention.window_attention(*tensors, window_attention.Rule(-1.0, None, 0, 0))


@pytest.mark.parametrize(
    ("width", "tiles"),
    [(8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (56, (64, 0)), (64, (64, 0)), (72, (64, 16)),
     (96, (64, 32)), (104, (128, 0)), (128, (128, 0)), (192, (128, 64)), (256, (256, 0))],
)  # fmt: skip
def test_tiles_of_a_width(width, tiles):
    assert window_attention.parts(width) == tiles
