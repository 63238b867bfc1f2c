"""Norm, scale and fusion of the two branches of an intra-layer hybrid.

Shape letters: s tokens of a sample, b samples of a micro-batch, w output channels of a branch, o channels of the output
projection (sum of the design's ``out_parts``). One rank's share is marked: w/tp, o/tp, s/cp.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from megatron_hybrid.kernels.branches import fuse, has_fusion_kernel
from megatron_hybrid.layers.intra.design import IntraDesign
from megatron_hybrid.layers.norm import SplitVector, group_rms_normalise
from megatron_hybrid.layers.parts import shared_by_ranks


def mean_alphas(chunks: list) -> dict[str, Any]:
    """The mean weight of the second branch in each layer of scale ``interpolate``, over all tokens since the last call.

    Args:
        chunks: The model's parts on this rank. A collective call: every rank takes part.

    Returns:
        ``{"intra_alpha": {layer number: mean}}``, the same on all ranks.
    """
    decoders = [get_attr_wrapped_model(chunk, "decoder") for chunk in chunks]
    layers = {}
    for mixer in (getattr(layer, "self_attention", None) for decoder in decoders for layer in decoder.layers):
        fusion = getattr(mixer, "fusion", None)
        if isinstance(fusion, IntraFusion):
            layers[mixer.layer_number] = fusion.mean_alpha()  # type: ignore[union-attr]
    last = torch.tensor(max(layers, default=0), device=torch.cuda.current_device())
    torch.distributed.all_reduce(last, op=torch.distributed.ReduceOp.MAX)
    sums = torch.zeros(int(last) + 1, 2, device=torch.cuda.current_device())  # [layers + 1, 2]: sum and count
    for number, (total, count) in layers.items():
        sums[number, 0], sums[number, 1] = total, count
    torch.distributed.all_reduce(sums)
    return {"intra_alpha": {str(n): total / count for n, (total, count) in enumerate(sums.tolist()) if count}}


FUSIONS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "add": lambda first, second: [first + second],
    "diff": lambda first, second: [first - second],
    "concat": lambda first, second: [first, second],
}
"""From two branches [s/cp, b, w/tp] to the input of the output projection, as one or two tensors [s/cp, b, w/tp]."""
SCALES: dict[str, Callable[["IntraFusion"], list[Tensor | None]]] = {
    "none": lambda fusion: [None, None],
    "vector": lambda fusion: [scale() for scale in fusion.scales],
    "scalar": lambda fusion: list(fusion.scalars.unbind()),
    "diff-lambda": lambda fusion: [None, fusion.differential_lambda()],
    "gate": lambda fusion: [None, None],  # this and the next depend on the token: IntraFusion._gates
    "interpolate": lambda fusion: [None, None],
}
"""The factor of each branch that does not depend on the token: a vector [w/tp], a scalar [], or None."""
NORMS = {"none": False, "group": True, "fused": False}
"""Whether the branches are normalised before the fusion."""


def entry(table: Mapping[str, Any], axis: str, value: str) -> Any:
    """The table's entry for the value of an axis.

    Raises:
        ValueError: The table has no such value.
    """
    if value not in table:
        raise ValueError(f"--intra-{axis} {value}: choose one of {', '.join(table)}.")
    return table[value]


def lambda_init(depth: int) -> float:
    """Initial lambda of block ``depth``, counted from 0 (Ye et al., arXiv:2410.05258, section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


class IntraFusion(MegatronModule):
    """s_1 Norm(b_1) (+) s_2 Norm(b_2), the input of the output projection.

    With separate output projections, sum, difference and concatenation are the same function, one matrix over the
    concatenated branches: ``W_1 b_1 - W_2 b_2 = [W_1, -W_2] [b_1; b_2]``. The sign is part of the stored weight, whose
    initial distribution is symmetric.

    Args:
        design: Axes and global widths.
        depth: Number of mixers before this one, for diff-lambda.
    """

    def __init__(self, config: TransformerConfig, design: IntraDesign, depth: int, tp_group: Any):
        super().__init__(config)
        self.design, self.tp_group, self.eps = design, tp_group, config.layernorm_epsilon
        self.fuse = entry(FUSIONS, "fusion", design.fusion if "fused" in design.out_parts else "concat")
        self.scale = entry(SCALES, "scale", design.scale)
        self.norms_branches = entry(NORMS, "norm", design.norm)
        branches = {name: design.width(i) for i, name in enumerate(design.names)}
        self.norms: tuple[SplitVector, ...] = ()
        if design.norm != "none":
            self.norms = self._vectors("norm", branches if design.norm == "group" else design.out_parts)
        self.scales: tuple[SplitVector, ...] = ()
        self.scalars: Tensor
        if design.scale == "vector":
            self.scales = self._vectors("scale", branches)
        elif design.scale == "scalar":
            self.scalars = shared_by_ranks(nn.Parameter(self._fp32(2).fill_(1.0)))
        elif design.scale == "diff-lambda":
            self.lambda_init = lambda_init(depth)
            # q1, k1, q2, k2 in one vector [4 d]: Megatron applies weight decay to parameters of two dimensions
            self.lambdas = shared_by_ranks(nn.Parameter(self._fp32(4 * design.lambda_dim).normal_(0, 0.1)))
        self.interpolates = design.scale == "interpolate"
        # Not a buffer: models in bf16 cast their buffers to bf16, which cannot count.
        self.alpha_sum = self._fp32(2).zero_()  # sum of the micro-batches' means, and their number

    def _vectors(self, kind: str, widths: dict[str, int]) -> tuple[SplitVector, ...]:
        tp = self.tp_group.size()
        made = {n: SplitVector(w // tp, self.config.params_dtype, self.tp_group) for n, w in widths.items()}
        for name, vector in made.items():
            self.add_module(f"{name}_{kind}", vector)
        return tuple(made.values())

    @staticmethod
    def _fp32(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=torch.cuda.current_device())

    def forward(self, first: Tensor, second: Tensor, gate: Tensor | None) -> Tensor:
        """Outputs of the branches, [s/cp, b, w/tp], to the input of the output projection, [s/cp, b, o/tp].

        ``gate`` has the logits of scales that depend on the token, [s/cp, b, 1 or 2]; None for other scales.
        """
        d = self.design
        if gate is None and d.norm != "fused" and (fused := self._fuse_in_one_pass(first, second)) is not None:
            return fused
        xs = [first, second]
        if self.norms_branches:
            xs = group_rms_normalise(xs, [d.groups(0), d.groups(1)], self.eps, self.tp_group)  # [s/cp, b, w/tp]
        xs = [x if f is None else x * f.to(x.dtype) for x, f in zip(xs, self._factors(), strict=True)]
        if gate is not None:
            xs = [x * g for x, g in zip(xs, self._gates(gate), strict=True)]
        parts = self.fuse(*xs)  # one or two of [s/cp, b, w/tp]
        if d.norm == "fused":
            groups = [d.groups(i) for i in range(len(parts))]
            parts = group_rms_normalise(parts, groups, self.eps, self.tp_group)
            parts = [x * self._after(norm()) for x, norm in zip(parts, self.norms, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)  # [s/cp, b, o/tp]

    def _fuse_in_one_pass(self, first: Tensor, second: Tensor) -> Tensor | None:
        """The same as :meth:`forward` by one kernel each way, [s/cp, b, o/tp]; None where there is none."""
        d, tp = self.design, self.tp_group.size()
        total = (d.groups(0), d.groups(1))
        if self.norms_branches and any(n % tp for n in total):
            return None  # groups span ranks
        groups = (total[0] // tp, total[1] // tp) if self.norms_branches else None
        fusion = d.fusion if "fused" in d.out_parts else "concat"
        scaled = self.norms_branches or d.scale not in ("none", "gate", "interpolate")
        if not has_fusion_kernel((first, second), scaled, groups, fusion):
            return None
        # a scalar is the factor of each channel
        widths = (first.shape[-1], second.shape[-1])
        f1, f2 = (f if f is None or f.dim() else f.repeat(w) for f, w in zip(self._factors(), widths, strict=True))
        return fuse((first, second), (f1, f2), groups, self.eps, fusion)

    def differential_lambda(self) -> Tensor:
        """exp(q1 . k1) - exp(q2 . k2) + lambda_init, a scalar [] (Ye et al., arXiv:2410.05258, equation 2)."""
        q1, k1, q2, k2 = self.lambdas.float().chunk(4)  # [d] each
        return torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + self.lambda_init

    def mean_alpha(self) -> tuple[float, float]:
        """The sum over training micro-batches of the second branch's mean weight, and their number; resets both."""
        total, count = self.alpha_sum.tolist()
        self.alpha_sum.zero_()
        return total, count

    def _factors(self) -> list[Tensor | None]:
        """The factor of each branch that does not depend on the token: norm weight times scale, [w/tp], [] or None."""
        result: list[Tensor | None] = [norm() for norm in self.norms] if self.norms_branches else [None, None]
        scales = self.scale(self)
        return [s if r is None else r if s is None else r * s for r, s in zip(result, scales, strict=True)]

    def _gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [s/cp, b, 1 or 2] to the weights of both branches, [s/cp, b, 1] each."""
        if not self.interpolates:
            first, second = torch.sigmoid(logits).split(1, -1)
            return first, second
        alpha = torch.sigmoid(logits)  # [s/cp, b, 1]
        if self.training and torch.is_grad_enabled():  # counts once: a recomputed pass first runs without gradients
            with torch.no_grad():
                self.alpha_sum += torch.stack([alpha.float().mean(), alpha.new_ones((), dtype=torch.float32)])
        return 1 - alpha, alpha

    def _after(self, weight: Tensor) -> Tensor:
        """The fused norm's weight [w/tp], with the Differential Transformer's constant factor 1 - lambda_init."""
        return weight * (1 - self.lambda_init) if self.design.scale == "diff-lambda" else weight
