"""The Triton scan, and the core of a Mamba-2 layer around it, beside references in float64: outputs and every gradient.

Errors are relative to the largest entry of the float64 tensor: single entries may be small by cancellation. Both sides
get the same inputs, rounded already.
"""

import torch
from torch import Tensor

from megatron_hybrid.kernels.combined import mamba_split_conv1d_scan_combined
from megatron_hybrid.kernels.conv import document_number
from megatron_hybrid.kernels.ssd import ssd_chunk_scan
from megatron_hybrid.kernels.triton import ssd_scan as scan
from megatron_hybrid.kernels.triton.mamba import mamba_split_conv_scan

# fp32: as in tests/kernels/test_ssd.py; products on a GPU are split into three of tf32, which loses no more.
# bf16: operands of the products are rounded to half a unit, 2^-9, among them decayed scores, states and dy. An output
# is a sum of products of two or three of those: up to 4 x 2^-9 = 8e-3 of its largest terms, and the gradients of A and
# of dt's bias add over all tokens what partly cancels. A wrong term shows at 5e-2 or more.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1.6e-2, torch.float16: 4e-3}


def documents(b: int, s: int) -> Tensor:
    """Contiguous documents of random lengths, [b, s]."""
    return torch.rand(b, s, generator=torch.Generator().manual_seed(s)).lt(0.06).cumsum(1).int()


def rounded(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Random numbers in ``dtype``."""
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def columns(tensor: Tensor, before: int = 8, after: int = 3) -> Tensor:
    """[b, s, w] as columns of a matrix [s, b, before + w + after], whose other columns are NaN."""
    b, s, w = tensor.shape
    wide = torch.full((s, b, before + w + after), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return wide[:, :, before : before + w].transpose(0, 1).copy_(tensor)


def scan_results(b, s, h, p, g, n, dtype, *, device="cpu", packed=False, initial=False, z=True, D=True, softplus=True):
    """Ours and the float64 scan's outputs and gradients, by name."""
    made = {
        "x": rounded(b, s, h * p, dtype=dtype, seed=0),
        "z": rounded(b, s, h * p, dtype=dtype, seed=1) if z else None,
        "B": rounded(b, s, g * n, dtype=dtype, seed=2, scale=n**-0.25),
        "C": rounded(b, s, g * n, dtype=dtype, seed=3, scale=n**-0.25),
        "raw_steps": rounded(b, s, h, dtype=dtype, seed=4) if softplus else rounded(b, s, h, dtype=dtype, seed=4).abs(),
        "bias": rounded(h, dtype=torch.float32, seed=5) - 2,
        "A": -rounded(h, dtype=torch.float32, seed=6).exp(),
        "D": rounded(h * p, dtype=torch.float32, seed=7) if D else None,
        "initial_states": rounded(b, h, p, n, dtype=torch.float32, seed=8) if initial else None,
    }
    dy, d_final = rounded(b, s, h * p, dtype=dtype, seed=9), rounded(b, h, p, n, dtype=torch.float32, seed=10)
    ids = documents(b, s) if packed else None
    return _ours(made, dy, d_final, ids, p, g, softplus, device), _exact(made, dy, d_final, ids, p, g, softplus)


def _ours(made, dy, d_final, ids, p, g, softplus, device) -> dict[str, Tensor]:
    moved = {k: None if t is None else t.to(device) for k, t in made.items()}
    rows = {k: columns(moved[k]) for k in ("x", "z", "raw_steps") if moved[k] is not None}
    B, C = columns(torch.cat([moved["B"], moved["C"]], -1)).chunk(2, -1)  # with the same strides, as in the layer
    numbers = None if ids is None else document_number(ids).int().to(device)
    inputs = scan.Scan(**{**moved, **rows, "B": B, "C": C}, documents=numbers, head_dim=p, groups=g, softplus=softplus)
    blank = lambda t: None if t is None else columns(torch.full_like(t, torch.nan))  # noqa: E731
    y = blank(moved["x"])
    final = scan.forward(inputs, y, want_final_states=True)
    to = scan.Gradients(*(blank(moved[k]) for k in ("x", "z", "B", "C", "raw_steps")))
    d_A, d_bias, d_D, d_first = scan.backward(inputs, columns(dy.to(device)), to, d_final.to(device))
    found = {"y": y, "final": final, **{f"d_{k}": t for k, t in to._asdict().items()}, "d_A": d_A, "d_bias": d_bias}
    found |= {"d_D": d_D if made["D"] is not None else None, "d_initial_states": d_first}
    return {k: t.cpu() for k, t in found.items() if t is not None}


def _exact(made, dy, d_final, ids, p, g, softplus) -> dict[str, Tensor]:
    t = {k: v.double().requires_grad_() for k, v in made.items() if v is not None}
    heads = lambda v: None if v is None else v.unflatten(-1, (-1, p))  # noqa: E731
    y, final = ssd_chunk_scan(
        heads(t["x"]), t["raw_steps"], t["A"], t["B"].unflatten(-1, (g, -1)), t["C"].unflatten(-1, (g, -1)), 64,
        D=heads(t.get("D")), z=heads(t.get("z")), dt_bias=t["bias"], dt_softplus=softplus,
        initial_states=t.get("initial_states"), seq_idx=ids, return_final_states=True,
    )  # fmt: skip
    grads = torch.autograd.grad((y, final), tuple(t.values()), (dy.double().unflatten(-1, (-1, p)), d_final.double()))
    return {
        "y": y.detach().flatten(-2),
        "final": final.detach(),
        **{f"d_{k}": v for k, v in zip(t, grads, strict=True)},
    }


def core_results(b, s, h, p, g, n, dtype, *, device="cpu", packed=False, initial=False):
    """Ours and the float64 core's outputs and gradients, by name; the projection is a view of a wider tensor."""
    inner = h * p
    made = {
        "zxbcdt": rounded(s, b, 2 * inner + 2 * g * n + h, dtype=dtype, seed=0),
        "conv_weight": rounded(inner + 2 * g * n, 4, dtype=dtype, seed=1, scale=0.5),
        "conv_bias": rounded(inner + 2 * g * n, dtype=dtype, seed=2),
        "dt_bias": rounded(h, dtype=torch.float32, seed=3) - 2,
        "A": -rounded(h, dtype=torch.float32, seed=4).exp(),
        "D": rounded(h, dtype=torch.float32, seed=5),
    }
    if initial:
        made["initial_states"] = rounded(b, h, p, n, dtype=torch.float32, seed=6)
    ids = documents(b, s) if packed else None
    dy, d_final = rounded(s, b, inner, dtype=dtype, seed=7), rounded(b, h, p, n, dtype=torch.float32, seed=8)

    ours = {k: t.to(device) for k, t in made.items()}
    ours["zxbcdt"] = columns(ours["zxbcdt"].transpose(0, 1)).transpose(0, 1)
    ours = {k: t.requires_grad_() for k, t in ours.items()}
    y, final = mamba_split_conv_scan(
        **ours, head_dim=p, groups=g, seq_idx=None if ids is None else ids.to(device), return_final_states=True
    )
    grads = torch.autograd.grad((y, final), tuple(ours.values()), (dy.to(device), d_final.to(device)))
    found = {"y": y.detach(), "final": final.detach()} | {f"d_{k}": v for k, v in zip(ours, grads, strict=True)}

    exact = {k: t.double().requires_grad_() for k, t in made.items()}
    wanted_y, wanted_final = mamba_split_conv1d_scan_combined(
        exact["zxbcdt"].transpose(0, 1), exact["conv_weight"], exact["conv_bias"], exact["dt_bias"], exact["A"],
        exact["D"], 64, initial_states=exact.get("initial_states"), seq_idx=ids, headdim=p, ngroups=g,
        return_final_states=True,
    )  # fmt: skip
    wanted_y = wanted_y.transpose(0, 1)
    grads = torch.autograd.grad((wanted_y, wanted_final), tuple(exact.values()), (dy.double(), d_final.double()))
    wanted = {"y": wanted_y.detach(), "final": wanted_final.detach()}
    wanted |= {f"d_{k}": v for k, v in zip(exact, grads, strict=True)}
    return {k: t.cpu() for k, t in found.items()}, wanted


def errors(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of each, against the largest entry of what is wanted; shapes and names must agree.

    A single token has a gradient of A that is zero, the difference of two equal sums: entries are of order one, and the
    largest is taken for 1e-2 at least.
    """
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in wanted.items()}
    return {
        n: float((ours[n].double() - want).abs().max() / want.abs().max().clamp(min=1e-2)) for n, want in wanted.items()
    }


def assert_close(results: tuple[dict[str, Tensor], dict[str, Tensor]], dtype: torch.dtype) -> None:
    found = errors(*results)
    assert {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]} == {}
