"""Costs of the mixture of experts: ``E``."""

from megatron_hybrid.accounting.saved import FP32, Rank, Saved, ffn
from megatron_hybrid.accounting.sizes import Sizes
from megatron_hybrid.accounting.tensors import (
    Linear,
    Parameters,
    Tensor,
    dense,
    ffn_linears,
    ffn_tensors,
    linear,
    norm,
    norm_sizes,
    weights,
)
from megatron_hybrid.accounting.traffic import Exchange, MicroBatch, projections, scatter
from megatron_hybrid.layers.ffn.account import ACTIVATION_SETTINGS, FFNAccount

EXPERT_SETTINGS = (
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_latent_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_apply_probs_on_input",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_token_drop_policy",
)


class ExpertsAccount(FFNAccount):
    """``E``: a router, routed experts, and a shared expert where ``s.shared_ffn`` is its width."""

    recompute = {"--recompute-modules": ("moe",)}
    stored_settings = ACTIVATION_SETTINGS + EXPERT_SETTINGS

    def linears(self, s: Sizes) -> list[Linear]:
        """The router, the experts that a token is routed to, and the shared expert with its gate."""
        if not s.experts:
            raise ValueError("E layers need --num-experts")
        found = [self._router(s), *ffn_linears(s, s.expert_ffn) * s.topk]
        if s.shared_ffn:
            found += ffn_linears(s, s.shared_ffn)
            if s.shared_gate:
                found.append((s.hidden, 1))
        return found

    def eight_bit_linears(self, whole: Sizes, s: Sizes, tp: int) -> list[Linear]:
        """Of all experts on the rank; router and gate are torch's."""
        shared = ffn_linears(s, s.shared_ffn) if s.shared_ffn else []
        return ffn_linears(s, s.expert_ffn) * (s.experts // s.expert_ranks) + shared

    def eight_bit_flops(self, whole: Sizes, tp: int) -> float:
        shared = ffn_linears(whole, whole.shared_ffn) if whole.shared_ffn else []
        return 2 * weights(ffn_linears(whole, whole.expert_ffn) * whole.topk + shared)

    def reads_in_8_bits(self, whole: Sizes, tp: int) -> bool:
        return False  # the router does, too

    def tensors(self, whole: Sizes, s: Sizes, tp: int) -> list[Tensor]:
        """Router, routed experts one by one, shared expert; its gate has no bias, and itself allows none.

        In backend ``te`` all first products of experts come before all second ones. The router's expert bias is a
        buffer: no parameter.
        """
        self.linears(s)
        router = linear(self._router(s), s.bias)
        experts = [Tensor(size, expert=True) for size in ffn_tensors(s, s.expert_ffn)] * (s.experts // s.expert_ranks)
        gate = [s.hidden] if s.shared_gate and s.shared_ffn else []
        shared = ffn_tensors(s, s.shared_ffn) if s.shared_ffn else []
        return dense(norm_sizes(s) + router) + experts + dense(gate + shared)

    def parameters(self, s: Sizes) -> Parameters:
        """``active``: of the experts, those that a token is routed to."""
        tensors = self.tensors(s, s, 1)
        total = sum(t.size for t in tensors)
        held = s.experts // s.expert_ranks
        one = sum(t.size for t in tensors if t.expert) // held
        return Parameters(total, total - (held - s.topk) * one)  # a rank may have fewer than a token meets

    def recomputed_flops(self, s: Sizes, modules: frozenset[str]) -> float:
        if "moe" in modules:
            return self.flops(s)
        return 2 * weights(ffn_linears(s, s.shared_ffn)) if "shared_experts" in modules else 0.0

    def saved(self, r: Rank) -> list[Saved]:
        """Routed evenly. Names and orders of routing are of core/transformer/moe/{moe_utils,token_dispatcher}.py.

        On CUDA tokens go the way of patches/experts.py, and with ``torch`` layers the experts' FFNs are computed at
        once (kernels/expert_ffn.py), which keeps the input of the second product no more.
        """
        if not r.keeps("moe"):
            return []
        s, t, e = r.s, r.rows, r.e
        n = t * s.topk * r.layout.etp  # the ranks of an expert gather each other's tokens
        lines = [
            Saved("router's scores", (t, s.experts), FP32),
            *_choice(r),
            *_order(r),
            Saved("tokens by expert", (n, s.hidden), r.operand),
            Saved("routing probabilities", (n,), FP32),
            *(_at_once(r, n) or ffn(r, n, s.expert_ffn, routed=True)),
        ]
        if s.shared_ffn and r.keeps("shared_experts"):
            if (
                r.settings.eight_bit == "delayed"
            ):  # other recipes quantise it again (core/transformer/moe/shared_experts.py)
                lines.append(Saved("shared: input in 8 bits", (t, s.hidden), r.operand))
            lines += [line._replace(name=f"shared: {line.name}") for line in ffn(r, r.tokens, s.shared_ffn)]
            if s.shared_gate:  # core/transformer/moe/shared_experts.py, ``SharedExpertMLP.forward``
                lines += [Saved("shared: before its gate", (t, s.hidden), e), Saved("shared: its gate", (t,), e)]
        return lines

    def exchanges(self, m: MicroBatch) -> list[Exchange]:
        """Tokens and probabilities to the experts' ranks and back (core/transformer/moe/token_dispatcher.py:698).

        Each rank of an expert's tensor group needs the tokens of all of them (``:739``).
        """
        s, layout, ep, etp = m.sizes, m.layout, m.layout.ep, m.layout.etp
        rows = m.tokens * s.topk / (layout.tp if layout.sequence_parallel else 1)
        tokens, probabilities = rows * s.hidden * m.settings.activation, rows * m.settings.probability
        moved = scatter(ep, tokens) * 2 + scatter(ep, probabilities)
        gathered = scatter(etp, etp * tokens) * 2 + scatter(etp, etp * probabilities)
        found = [
            Exchange("expert", moved, moved, ("moe",)),
            Exchange("expert tensor", gathered, gathered, ("moe",)),
        ]
        return found + (projections(m, "moe", "shared_experts") if s.shared_ffn else [])

    def not_cut(self, s: Sizes) -> int:
        gate = s.hidden * bool(s.shared_ffn and s.shared_gate)
        return norm(s) + weights([self._router(s)]) + s.bias * s.experts + gate

    def _router(self, s: Sizes) -> Linear:
        return s.hidden, s.experts


def _choice(r: Rank) -> list[Saved]:
    """On CUDA what sigmoids need (kernels/expert_choice.py); with softmax upstream keeps some bytes more or less."""
    t, experts, topk = r.rows, r.s.experts, r.s.topk
    if r.cpu:
        return [Saved("chosen experts", (t, topk), 8), Saved("their scores, and the sum", (t, topk + 1), FP32)]
    return [Saved("chosen experts", (t, experts), 1)]


def _order(r: Rank) -> list[Saved]:
    t, experts, topk = r.rows, r.s.experts, r.s.topk
    if r.cpu:
        return [
            Saved("order of tokens by expert, in which it is sorted", (experts, t), 8),
            Saved("order of tokens by expert", (t, topk), 8),
        ]
    return [Saved("rows of tokens, and back", (t, topk + experts + 1), 4)]


def _at_once(r: Rank, n: int) -> list[Saved]:
    """What the FFNs of all experts keep between their products; nothing where layers/moe/module.py loops over them."""
    s = r.s
    grouped = s.experts // s.expert_ranks > 1 and not s.bias and s.hidden % 8 == s.expert_ffn % 8 == 0
    if r.cpu or r.settings.backend != "torch" or r.e != 2 or not s.gated or not grouped:
        return []
    return [Saved("first projection", (2, n, s.expert_ffn), r.e)]
