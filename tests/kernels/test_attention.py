"""The attention kernel against its definition in Python loops, and against a float64 reference.

Errors are relative to the largest entry of the float64 tensor; both sides get the same (already rounded) inputs.
"""

import math
from functools import partial

import pytest
import torch

from megatron_hybrid.kernels.attention import attention, attention_reference, kernel_for
from megatron_hybrid.kernels.attention_masks import _masks, document_ends, document_starts, visible
from megatron_hybrid.kernels.flex_attention import blocks

# fp32: each entry is a sum of at most 260 products of numbers of order one, whose rounding errors (6e-8 each) add
# like a random walk to about 1e-6; a factor of five as a margin. A wrong mask entry gives 1e-2 or more.
# bf16: scores are accumulated in fp32, but the weights are rounded before the product with V and the gradients before
# those with Q and K: several roundings of half a unit (2^-9 = 2e-3, up to 2^-8) each, of which a few may add.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2}
LENGTHS = [1, 63, 65, 130]
WINDOWS = [(None, 0), (9, 0), (9, 3), (1, 1), (64, 64)]
# query heads, key heads, width of Q and K, width of V
HEADS = [(4, 4, 16, 16), (4, 2, 16, 16), (6, 2, 8, 24), (3, 1, 12, 12)]


def make_inputs(sq, sk, heads, dtype=torch.float32, batch=2):
    h, hk, d, dv = heads
    generator = torch.Generator().manual_seed(sq + 7 * sk)
    shapes = (batch, h, sq, d), (batch, hk, sk, d), (batch, hk, sk, dv)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def output_and_gradients(function, inputs, *settings, dtype=None):
    """The output and the gradients of q, k and v for one fixed output gradient (exact in bf16)."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = function(*inputs, inputs[0].shape[-1] ** -0.5, *settings)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(out, inputs, dy.to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))


def assert_close(found, expected):
    # A lone query's weight is 1 whatever q and k are: dq and dk are zero, but as a difference of two sums over the
    # value channels, each of order one to five (torch's fused CPU kernel subtracts them in fp32), times q or k. So
    # errors are never counted against less than 1.
    for name, want in expected.items():
        got = found[name]
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1.0)
        assert error <= TOLERANCE[got.dtype], f"{name}: relative error {error:.1e}"


def make_documents(*lengths):
    """Ids of documents of these lengths, one list of lengths for each sample; int32 [b, s]."""
    return torch.tensor([[i for i, n in enumerate(sample) for _ in range(n)] for sample in lengths], dtype=torch.int32)


def looped(q, k, v, scale, window, sinks, offset, documents=None):
    """Attention by its definition: every query, every key, every channel on its own; [b, h, sq, dv] as lists."""
    b, h, sq, d = q.shape
    group = h // k.shape[1]
    out = torch.zeros(b, h, sq, v.shape[-1], dtype=torch.float64)
    for sample in range(b):
        for head in range(h):
            keys, values = k[sample, head // group].tolist(), v[sample, head // group].tolist()
            for row in range(sq):
                i = offset + row
                weights = {}
                start = documents[sample].tolist().index(documents[sample, i]) if documents is not None else 0
                for j in range(start, i + 1):
                    if window is None or i - j < window or j - start < sinks:
                        score = sum(a * c for a, c in zip(q[sample, head, row].tolist(), keys[j], strict=True))
                        weights[j] = math.exp(scale * score)
                total = sum(weights.values())
                for channel in range(v.shape[-1]):
                    out[sample, head, row, channel] = sum(w * values[j][channel] for j, w in weights.items()) / total
    return out


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 0), (3, 2), (1, 0), (2, 20)])
def test_both_forms_equal_attention_by_its_definition(window, sinks):
    q, k, v = make_inputs(6, 11, (4, 2, 3, 5), torch.float64)
    expected = looped(q, k, v, 0.4, window, sinks, offset=5)
    for form in (attention, attention_reference):
        assert torch.allclose(form(q, k, v, 0.4, window, sinks, 5), expected, rtol=0, atol=1e-13), form.__name__


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (3, 0), (3, 2), (1, 0), (2, 20)])
def test_both_forms_equal_attention_inside_documents_by_its_definition(window, sinks):
    q, k, v = make_inputs(9, 15, (4, 2, 3, 5), torch.float64)
    documents = make_documents([1, 6, 4, 4], [8, 7])
    expected = looped(q, k, v, 0.4, window, sinks, 5, documents)
    for form in (attention, attention_reference):
        found = form(q, k, v, 0.4, window, sinks, 5, documents=documents)
        assert torch.allclose(found, expected, rtol=0, atol=1e-13), form.__name__


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (4, 0), (4, 2), (4, 30), (50, 2)])
@pytest.mark.parametrize(("sq", "sk", "offset"), [(1, 1, 0), (13, 13, 0), (5, 13, 8), (5, 13, 3)])
def test_mask_is_its_definition(sq, sk, offset, window, sinks):
    mask = visible(sq, sk, window, sinks, offset, torch.device("cpu"))
    for row in range(sq):
        for j in range(sk):
            i = offset + row
            seen = j <= i and (window is None or j > i - window or j < sinks)
            assert bool(mask[row, j]) == seen, (i, j)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("length", LENGTHS)
def test_output_and_all_gradients(length, window, sinks, heads, dtype):
    inputs = make_inputs(length, length, heads, dtype)
    expected = output_and_gradients(attention_reference, inputs, window, sinks, dtype=torch.float64)
    found = output_and_gradients(attention, inputs, window, sinks)
    assert found["out"].dtype == dtype
    assert_close(found, expected)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize(("sq", "offset"), [(1, 64), (32, 33), (33, 0), (63, 40)])
def test_a_part_of_the_queries(sq, offset, window, sinks, heads):
    """As under context parallelism and with caches: fewer queries than keys, and keys after the last query."""
    inputs = make_inputs(sq, 130, heads)
    expected = output_and_gradients(attention_reference, inputs, window, sinks, offset, dtype=torch.float64)
    assert_close(output_and_gradients(attention, inputs, window, sinks, offset), expected)


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
def test_parts_of_the_queries_make_the_whole(window, sinks):
    q, k, v = make_inputs(65, 65, (4, 2, 16, 16), torch.float64)
    whole = attention(q, k, v, 0.25, window, sinks)
    parts, offset = [], 0
    for part in q.split([1, 31, 32, 1], 2):
        parts.append(attention(part, k, v, 0.25, window, sinks, offset))
        offset += part.shape[2]
    assert torch.allclose(torch.cat(parts, 2), whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("i", [0, 5, 20, 63])
def test_a_query_reads_its_keys_and_no_others(i, window, sinks):
    """Gradients of one query's output are exactly zero for each key and value that it does not see."""
    inputs = [t.requires_grad_() for t in make_inputs(64, 64, (2, 2, 8, 8))]
    out = attention(*inputs, 0.35, window, sinks)
    _, dk, dv = torch.autograd.grad(out[:, :, i].square().sum(), inputs)
    seen = torch.tensor([j <= i and (window is None or i - j < window or j < sinks) for j in range(64)])
    for gradient in (dk, dv):
        per_key = gradient.abs().sum((0, 1, 3))
        assert (per_key[~seen] == 0).all()
    assert (dv.abs().sum((0, 1, 3))[seen] > 0).all()


def test_what_lies_behind_the_last_query_may_be_anything():
    q, k, v = make_inputs(10, 30, (2, 1, 8, 8))
    out = attention(q, k, v, 0.35, 4, 2, offset=5)
    k[:, :, 15:], v[:, :, 15:] = float("nan"), float("inf")
    assert torch.equal(attention(q, k, v, 0.35, 4, 2, offset=5), out)


# Documents -------------------------------------------------------------------------------------------

DOCUMENTS = make_documents([1, 17, 64, 48], [130])
"""Documents shorter and longer than the windows, and one that fills its sample."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize(("sq", "offset"), [(130, 0), (33, 0), (45, 60)])
def test_output_and_all_gradients_inside_documents(sq, offset, window, sinks, heads, dtype):
    q, k, v = make_inputs(130, 130, heads, dtype)
    inputs = [q[:, :, offset : offset + sq], k, v]
    settings = window, sinks, offset
    expected = output_and_gradients(
        partial(attention_reference, documents=DOCUMENTS), inputs, *settings, dtype=torch.float64
    )
    assert_close(output_and_gradients(partial(attention, documents=DOCUMENTS), inputs, *settings), expected)


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
def test_a_document_is_attended_to_as_if_it_stood_alone(window, sinks):
    q, k, v = (t[:1] for t in make_inputs(130, 130, (4, 2, 16, 16), torch.float64))
    packed = attention(q, k, v, 0.25, window, sinks, documents=DOCUMENTS[:1])
    alone = [
        attention(*parts, 0.25, window, sinks)
        for parts in zip(*(t.split([1, 17, 64, 48], 2) for t in (q, k, v)), strict=True)
    ]
    assert torch.allclose(packed, torch.cat(alone, 2), rtol=0, atol=1e-13)


def test_document_starts():
    assert document_starts(make_documents([1, 3, 2], [6])).tolist() == [[0, 1, 1, 1, 4, 4], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("window", "sinks"), [(None, 0), (1, 0), (100, 0), (128, 64), (129, 1), (300, 200), (257, 128), (1, 300)]
)
@pytest.mark.parametrize(("sq", "offset"), [(1000, 0), (130, 60), (512, 256), (1, 999)])
def test_blocks_are_those_that_hold_the_entries(sq, offset, window, sinks, packed):
    """The CUDA kernel's mask: a skipped block has no visible pair, a full block no hidden pair."""
    sk, size = offset + sq, 128
    documents = make_documents([1, 127, 128, 3, 400, 341], [1000]) if packed else None
    mask = visible(sq, sk, window, sinks, offset, torch.device("cpu"), documents)
    mask = mask if packed else mask[None, None]
    found = blocks(sq, sk, window, sinks, offset, torch.device("cpu"), documents)
    tail = (0, -sk % size, 0, -sq % size)
    tiles = torch.nn.functional.pad(mask, tail).unfold(2, size, size).unfold(3, size, size).float().mean((-1, -2))
    partial_, full = (
        (torch.zeros(i.shape).scatter_(-1, i.long(), (torch.arange(i.shape[-1]) < n[..., None]).float()))
        for n, i in (
            (found.kv_num_blocks, found.kv_indices),
            (found.full_kv_num_blocks, found.full_kv_indices),
        )
    )
    assert torch.equal((partial_ + full) > 0, tiles > 0)
    assert (tiles[full > 0] == 1).all()
    if window is None or not sinks:
        assert torch.equal(full > 0, tiles == 1)
    rows, columns = torch.arange(sq)[:, None], torch.arange(sk)[None, :]
    for sample in range(len(mask)):
        assert torch.equal(found.mask_mod(sample, 0, rows, columns), mask[sample, 0])


def test_documents_that_change_in_place_are_seen():
    """Masks are cached for each tensor of ids."""
    q, k, v = make_inputs(8, 8, (2, 2, 8, 8))
    documents = make_documents([4, 4], [4, 4])
    before = attention(q, k, v, 0.35, documents=documents)
    assert torch.equal(attention(q, k, v, 0.35, documents=documents), before)
    documents[:, 2:] = 1
    changed = attention(q, k, v, 0.35, documents=documents)
    assert torch.equal(changed, attention(q, k, v, 0.35, documents=make_documents([2, 6], [2, 6])))
    assert not torch.equal(changed, before)


def test_masks_live_as_long_as_their_documents():
    q, k, v = make_inputs(8, 8, (2, 2, 8, 8))
    documents = make_documents([4, 4], [4, 4])
    attention(q, k, v, 0.35, documents=documents)
    attention(q, k, v, 0.35, 3, 1, documents=documents)
    assert len(_masks[documents]) == 2
    with_it = len(_masks)
    del documents
    assert len(_masks) == with_it - 1


@pytest.mark.parametrize("shape", [(1, 8), (2, 7)])
def test_documents_of_another_shape_are_refused(shape):
    q, k, v = make_inputs(8, 8, (2, 2, 8, 8))
    with pytest.raises(ValueError, match=r"need \[2, at least 8\]"):
        attention(q, k, v, 0.35, documents=torch.zeros(shape, dtype=torch.int32))


def test_document_ends():
    assert document_ends(make_documents([1, 3, 2], [6])).tolist() == [[1, 4, 4, 4, 6, 6], [6] * 6]


# The choice of the kernel ------------------------------------------------------------------------------

HOPPER, AMPERE = (9, 0), (8, 0)


def chosen(prefer="auto", **changes):
    call = {"masked": False, "chunk": False, "widths": (64, 64), "dtype": torch.bfloat16, "capability": HOPPER}
    return kernel_for(prefer, **(call | {"dropout": 0.0} | changes))


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [  # for auto, triton, cudnn, torch
        ({}, "sdpa triton cudnn sdpa"),
        ({"widths": (72, 128)}, "cudnn triton cudnn sdpa"),
        ({"widths": (72, 128), "capability": AMPERE}, "sdpa triton cudnn sdpa"),
        ({"widths": (128, 256)}, "sdpa triton cudnn sdpa"),
        ({"widths": (60, 64)}, "sdpa sdpa sdpa sdpa"),
        ({"widths": (72, 128), "dtype": torch.float32}, "sdpa sdpa sdpa sdpa"),
        ({"widths": (72, 128), "dropout": 0.1}, "cudnn cudnn cudnn sdpa"),
        ({"widths": (72, 128), "chunk": True}, "triton triton triton sdpa"),
        ({"chunk": True, "dropout": 0.1}, "sdpa sdpa sdpa sdpa"),
        ({"masked": True}, "triton triton triton flex"),
        ({"masked": True, "chunk": True, "capability": AMPERE}, "triton triton triton flex"),
        ({"masked": True, "dtype": torch.float32}, "flex flex flex flex"),
        ({"masked": True, "widths": (264, 64)}, "flex flex flex flex"),
        ({"masked": True, "capability": (7, 5)}, "flex flex flex flex"),
        ({"masked": True, "capability": None}, "sdpa sdpa sdpa sdpa"),
    ],
    ids=str,
)
def test_the_kernel_of_a_call(changes, kernels):
    assert [chosen(prefer, **changes) for prefer in ("auto", "triton", "cudnn", "torch")] == kernels.split()
