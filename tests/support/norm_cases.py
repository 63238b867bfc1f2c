"""The Triton kernels of norms and of fusion beside their references in float64, on any device."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hybrid.kernels.branches import fuse, fuse_reference
from megatron_hybrid.kernels.norms import rms_norm, rms_norm_reference

# Relative to the largest entry. fp32: sums of up to some thousand terms. bf16: sums are fp32, and results rounded once,
# to 2^-9; a sum of two rounded gradients, of which one may cancel the other, twice.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype, seed: int, device: str = "cpu", columns: int = 0) -> Tensor:
    """Normal numbers [..., c], equal for all dtypes and devices; with ``columns``, rows have as many NaN behind."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    wide = torch.full((*shape[:-1], shape[-1] + columns), torch.nan, dtype=dtype, device=device)
    place = wide[..., : shape[-1]]
    place.copy_(made)
    return place


def errors(run: Callable, reference: Callable, inputs: list[Tensor], seeds: list[int]) -> dict[str, float]:
    """Largest differences of outputs and all gradients from the reference's in float64, each of its largest entry.

    Args:
        run: Of the inputs; returns tensors.
        reference: The same, of the inputs in float64.
        inputs: Those that have gradients.
        seeds: Of the gradients of the outputs.
    """
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    outputs, wanted = run(*ours), reference(*exact)
    gradients = [
        random(*y.shape, dtype=y.dtype, seed=seed, device=y.device) for y, seed in zip(outputs, seeds, strict=True)
    ]
    found = torch.autograd.grad(outputs, ours, gradients)
    right = torch.autograd.grad(wanted, exact, [g.cpu().double() for g in gradients])
    pairs = [*zip(outputs, wanted, strict=True), *zip(found, right, strict=True)]
    names = [*(f"output {i}" for i in range(len(outputs))), *(f"gradient {i}" for i in range(len(ours)))]
    differences = {}
    for name, (a, b) in zip(names, pairs, strict=True):
        assert a.shape == b.shape and a.isfinite().all()
        differences[name] = float((a.detach().cpu().double() - b).abs().max() / b.abs().max().clamp(min=1e-30))
    return differences


def norm_errors(s, b, groups, width, dtype, *, device="cpu", weight=True, residual=True, columns=0) -> dict[str, float]:
    """Of a norm; with the residual, whose gradient is added."""
    x = random(s, b, groups * width, dtype=dtype, seed=0, device=device, columns=columns)
    inputs = [x, *([random(groups * width, dtype=dtype, seed=1, device=device)] if weight else [])]

    def run(x: Tensor, w: Tensor | None = None) -> list[Tensor]:
        y, beside = rms_norm(x, w, 1e-5, groups)
        return [y, beside] if residual else [y]

    def reference(x: Tensor, w: Tensor | None = None) -> list[Tensor]:
        y = rms_norm_reference(x, w, 1e-5, groups)
        return [y, 1 * x] if residual else [y]

    return errors(run, reference, inputs, [2, 3][: 1 + residual])


def fusion_errors(
    s, b, widths, groups, fusion, dtype, *, device="cpu", with_factors=(True, True), columns=0, transposed=False
) -> dict[str, float]:
    """Of two branches [s, b, width] each; the second one, where it is transposed, stands in memory as [b, s, width]."""
    xs = [random(s, b, w, dtype=dtype, seed=i, device=device, columns=columns) for i, w in enumerate(widths)]
    if transposed:
        xs[1] = xs[1].transpose(0, 1).contiguous().transpose(0, 1)
    factors = [random(w, dtype=dtype, seed=2 + i, device=device) for i, w in enumerate(widths) if with_factors[i]]

    def of(function: Callable) -> Callable:
        def run(x1: Tensor, x2: Tensor, *fs: Tensor) -> list[Tensor]:
            given = iter(fs)
            both = tuple(next(given) if has else None for has in with_factors)
            return [function((x1, x2), both, groups, 1e-5, fusion)]

        return run

    return errors(of(fuse), of(fuse_reference), [*xs, *factors], [5])
