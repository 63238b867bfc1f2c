"""Calls of the Triton attention and their float64 reference, for tests on the CPU and on a GPU."""

import torch
from torch import Tensor

from megatron_hybrid.kernels.attention import attention_reference
from megatron_hybrid.kernels.attention_masks import document_ends, document_starts

# As in tests/kernels/test_attention.py: fp32 sums of a few hundred products of order one, in another order; bf16 rounds
# weights and gradients before products (2^-9 each), of which a few add up.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def ids(*lengths: list[int]) -> Tensor:
    """Ids of documents of these lengths, one list for each sample; int32 [b, s]."""
    return torch.tensor([[i for i, n in enumerate(sample) for _ in range(n)] for sample in lengths], dtype=torch.int32)


def inputs(b, heads, sq, offset, widths, dtype, device="cpu"):
    """q, k, v [b, heads, s, width], stored as a layer's: q alone, k and v columns of one projection [s, b, ...]."""
    (h, hk), (d, dv), sk = heads, widths, sq + offset
    generator = torch.Generator().manual_seed(sq + 7 * sk)
    q = torch.randn(sq, b, h, d, generator=generator).to(device, dtype)
    k_v = torch.randn(sk, b, hk, d + dv, generator=generator).to(device, dtype)
    return [t.permute(1, 2, 0, 3) for t in (q, k_v[..., :d], k_v[..., d:])]


def errors(tensors, window, sinks, offset, documents=None):
    """Output and gradients of q, k and v: the largest error of each relative to its largest entry, or to 1 if greater.

    A lone key's weight is 1 whatever q and k are; see test_attention.py.
    """
    from megatron_hybrid.kernels.triton.window_attention import Rule, window_attention

    device = tensors[0].device
    scale = tensors[0].shape[-1] ** -0.5
    bounds = (None, None) if documents is None else (document_starts(documents), document_ends(documents))
    ours = [t.detach().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out = window_attention(
        *ours, Rule(scale, window, sinks, offset), *(b if b is None else b.to(device) for b in bounds)
    )
    known = None if documents is None else documents[:, : ours[1].shape[2]].to(device)
    wanted = attention_reference(*exact, scale, window, sinks, offset, known)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(wanted.shape, generator=generator).to(device, tensors[0].dtype)
    found = out, *torch.autograd.grad(out, ours, dy)
    right = wanted, *torch.autograd.grad(wanted, exact, dy.double())
    pairs = zip(("out", "dq", "dk", "dv"), found, right, strict=True)
    return {
        name: float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max().clamp(min=1.0))
        for name, got, want in pairs
    }
