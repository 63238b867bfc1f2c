"""Layouts that fit: every combination that the rules allow, memory first, then ranked by the model of time.

A layout is proposed when the fullest rank's parameters, gradients, optimizer state and activations take no more than
``Machine.limit``. Of one layout and micro-batch the least recomputation that fits is taken. Sequence
parallelism goes with tensor parallelism, which stays inside a node; the distributed optimizer is always on; pipeline
stages are cut by work. What the command line sets itself is kept. Each proposal has been through the same
checks as a run, Megatron's own among them, before it is shown.
"""

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron_hybrid import costs
from megatron_hybrid.accounting.activation_settings import ActivationSettings
from megatron_hybrid.accounting.storage import Storage
from megatron_hybrid.argv import value
from megatron_hybrid.cli.checks import check
from megatron_hybrid.cli.flags import resolve
from megatron_hybrid.costs.activations import stage_activation_bytes
from megatron_hybrid.costs.hardware import MICRO_BATCHES
from megatron_hybrid.costs.memory import rank_memory
from megatron_hybrid.layers.registry import has_experts, layers_of
from megatron_hybrid.pattern import Pattern
from megatron_hybrid.plan.figures import Figures, memory, times
from megatron_hybrid.plan.subject import Subject, Where, read
from megatron_hybrid.plan.time import Machine, step_time

SEGMENTS = (1, 2)
"""Virtual stages of a pipeline stage."""
LONG = 16384
"""Tokens from which context parallelism is tried."""


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory and time."""

    subject: Subject
    flags: list[str]
    bytes: int
    seconds: float


def fit(
    argv: Sequence[str],
    gpus: int,
    machine: Machine,
    device: str = "cuda",
    most: int = 5,
) -> Figures:
    """The fastest layouts that fit.

    Args:
        argv: A command line of ``pretrain_hybrid.py``.
        gpus: Ranks.
        most: Proposals.

    Returns:
        ``tried``, ``fitting``: numbers of combinations; ``limit``: bytes that a rank may take; ``proposals``: flags,
        layout, memory of the fullest rank, times; ``least``: where none fits, the one that needs the least memory.

    Raises:
        ValueError: What the run itself would be refused for, whatever the layout.
    """
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: give at least 1.")
    base = unplaced(argv, device)
    limit = machine.limit
    tried, least = 0, None
    found: list[Candidate] = []
    for subject, flags in _layouts(base, argv, gpus, machine):
        tried += 1
        candidate = _least_recomputation(subject, flags, limit, argv)
        if candidate.bytes <= limit:
            found.append(replace(candidate, seconds=step_time(candidate.subject, machine).total))
        elif least is None or candidate.bytes < least.bytes:
            least = candidate
    found.sort(key=lambda c: (c.seconds, c.bytes))
    proposals = _checked(found, argv, Where(gpus, device), machine, most)
    return {
        "name": base.name,
        "gpus": gpus,
        "gpu": machine.title,
        "memory": machine.memory,
        "limit": limit,
        "tried": tried,
        "fitting": len(found),
        "proposals": proposals,
        "least": {"flags": least.flags, "bytes": least.bytes} if least and not found else None,
    }


def unplaced(argv: Sequence[str], device: str = "cuda") -> Subject:
    """The run in the smallest layout that its flags allow, whatever they leave open.

    Raises:
        ValueError: What the run itself would be refused for, whatever the layout.
    """
    return read([*argv, *_free(argv)], None, device)


def _free(argv: Sequence[str]) -> list[str]:
    """Flags that let any command line be read before its layout is known: they are varied."""
    stages = value(list(argv), "--pipeline-model-parallel-size")
    cut = ["--balance-pipeline", stages] if stages and not _cuts_itself(argv) else []
    return cut if _given(argv, "--micro-batch-size") else [*cut, "--micro-batch-size", "1"]


def _cuts_itself(argv: Sequence[str]) -> bool:
    """Whether the command line says where stages begin."""
    return _given(argv, "--balance-pipeline") or len(resolve([*argv, "--balance-pipeline=1"]).pattern.segments) > 1


def _given(argv: Sequence[str], *names: str) -> bool:
    return any(word.split("=", 1)[0] in names for word in argv)


def _layouts(base: Subject, argv: Sequence[str], gpus: int, machine: Machine) -> Iterator[tuple[Subject, list[str]]]:
    """Every layout that the rules allow, without recomputation, and its flags."""
    args, plain = base.args, base.pattern.without_boundaries()
    fixed_pipeline = _cuts_itself(argv)

    def sizes(flag: str, name: str, values: Sequence[int]) -> Sequence[int]:
        return [getattr(args, name)] if _given(argv, flag) else values

    powers = [2**i for i in range(gpus.bit_length()) if gpus % 2**i == 0]
    tps = sizes(
        "--tensor-model-parallel-size", "tensor_model_parallel_size", [n for n in powers if n <= machine.gpus_per_node]
    )
    cps = sizes("--context-parallel-size", "context_parallel_size", powers if args.seq_length >= LONG else [1])
    experts = args.num_experts or 1
    eps = sizes("--expert-model-parallel-size", "expert_model_parallel_size", [n for n in powers if experts % n == 0])
    eps = eps if has_experts(plain.layers + plain.mtp) else [1]
    micros = sizes("--micro-batch-size", "micro_batch_size", MICRO_BATCHES)
    given_pp = fixed_pipeline or _given(argv, "--pipeline-model-parallel-size")
    pps = [base.layout.pp] if given_pp else [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp, pp, cp, ep, micro in product(tps, pps, cps, eps, micros):
        changes = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "expert_model_parallel_size": ep,
            "micro_batch_size": micro,
        }
        for vpp in [base.layout.vpp] if fixed_pipeline else SEGMENTS if pp > 1 else (1,):
            if pp * vpp <= len(plain.layers):
                made = _subject(base, plain, gpus, vpp, changes, fixed_pipeline)
                if made:
                    yield made, _flags(made, argv, fixed_pipeline)


def _subject(
    base: Subject, plain: Pattern, gpus: int, vpp: int, changes: dict[str, int], fixed: bool
) -> Subject | None:
    """The run in another layout; None where the rules refuse it."""
    tp, pp, cp = (changes[f"{kind}_parallel_size"] for kind in ("tensor_model", "pipeline_model", "context"))
    args = Namespace(**{**vars(base.args), **changes})
    args.world_size, args.sequence_parallel = gpus, tp > 1
    args.use_distributed_optimizer = True
    args.expert_tensor_parallel_size = 1 if has_experts(plain.layers) else tp
    if gpus % (tp * pp * cp):
        return None
    args.data_parallel_size = gpus // (tp * pp * cp)
    batch = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % batch or vpp > 1 and args.global_batch_size // batch % pp:
        return None
    args.overlap_grad_reduce = args.overlap_param_gather = args.data_parallel_size > 1
    args.tensor_parallel_num_weight_shards = args.expert_tensor_parallel_num_weight_shards = (
        None  # Megatron derives them
    )
    args.padded_vocab_size = None if args.vocab_size else args.padded_vocab_size
    try:
        check(args)
        sizes = costs.sizes_of(args)
        pattern = base.pattern if fixed or pp == 1 else costs.balance_pipeline(plain, sizes, pp * vpp, pp)
        args.hybrid_layer_pattern = str(pattern)
        return replace(base, args=args, pattern=pattern, sizes=sizes, layout=costs.Layout.from_args(args))
    except ValueError:
        return None


def _flags(subject: Subject, argv: Sequence[str], fixed: bool) -> list[str]:
    """What to add to the command line for a layout."""
    layout = subject.layout
    values = {
        "--tensor-model-parallel-size": layout.tp if layout.tp > 1 else None,
        "--pipeline-model-parallel-size": layout.pp if layout.pp > 1 and not fixed else None,
        "--balance-pipeline": layout.pp * layout.vpp if layout.pp > 1 and not fixed else None,
        "--context-parallel-size": layout.cp if layout.cp > 1 else None,
        "--expert-model-parallel-size": layout.ep if subject.args.num_experts else None,
        "--expert-tensor-parallel-size": layout.etp if subject.args.num_experts and layout.tp > 1 else None,
        "--micro-batch-size": layout.micro_batch,
    }
    words = [w for flag, value in values.items() if value and not _given(argv, flag) for w in (flag, str(value))]
    switches = ["--sequence-parallel"] if layout.tp > 1 else []
    switches += ["--use-distributed-optimizer"]
    switches += ["--overlap-grad-reduce", "--overlap-param-gather"] if layout.dp > 1 else []
    return words + [flag for flag in switches if not _given(argv, flag)]


def _recomputations(subject: Subject, argv: Sequence[str]) -> Iterator[tuple[dict, list[str]]]:
    """Settings and flags from none to all; what the command line sets is the only one."""
    yield {}, []
    if _given(argv, "--recompute-granularity", "--recompute-activations", "--hybrid-recompute"):
        return
    layers = subject.pattern.layers + subject.pattern.mtp
    found = layers_of(layers)
    ours, modules = (
        list(dict.fromkeys(name for layer in found for name in layer.account.recompute.get(flag, ())))
        for flag in ("--hybrid-recompute", "--recompute-modules")
    )
    if ours or modules:
        settings: dict = {"hybrid_recompute": ours}
        flags = ["--hybrid-recompute", *ours] if ours else []
        if modules:
            settings |= {"recompute_granularity": "selective", "recompute_modules": modules}
            flags += ["--recompute-granularity", "selective", "--recompute-modules", *modules]
        yield settings, flags
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    flags = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    yield full, flags


def _least_recomputation(subject: Subject, flags: list[str], limit: float, argv: Sequence[str]) -> Candidate:
    """With the first recomputation that fits, else with the one that needs the least memory."""
    storage = Storage.from_args(subject.args)
    where = (subject.pattern, subject.sizes, subject.layout)
    held = [rank_memory(*where, storage, stage).total for stage in range(subject.layout.pp)]
    best: Candidate | None = None
    for settings, more in _recomputations(subject, argv):
        args = Namespace(**{**vars(subject.args), **settings})
        activations = ActivationSettings.from_args(args)
        need = max(h + stage_activation_bytes(*where, activations, stage) for stage, h in enumerate(held))
        candidate = Candidate(replace(subject, args=args), flags + more, need, math.inf)
        if need <= limit:
            return candidate
        if best is None or need < best.bytes:
            best = candidate
    assert best is not None  # there is always the command line's own recomputation
    return best


def _checked(
    found: Sequence[Candidate], argv: Sequence[str], where: Where, machine: Machine, most: int
) -> list[Figures]:
    """The first layouts that a run would accept, figured again from their flags alone."""
    proposals: list[Figures] = []
    shown: set[costs.Layout] = set()
    for candidate in found:
        alike = _but_micro_batch(candidate.subject.layout)
        if len(proposals) == most or alike in shown:
            continue
        try:
            subject = read([*argv, *candidate.flags], *where)
        except ValueError:
            continue  # a rule of Megatron's own that the search does not know
        shown.add(alike)
        same = [c.subject.layout.micro_batch for c in found if _but_micro_batch(c.subject.layout) == alike]
        rows = memory(subject)
        proposals.append(
            {
                "micro_batches_that_fit": sorted(same),
                "flags": candidate.flags,
                "pattern": str(subject.pattern),
                "layout": subject.layout.__dict__,
                "recompute": _recompute(subject),
                "memory": max(rows, key=lambda row: row["total"]),
                "time": times(subject, machine),
            }
        )
    return proposals


def _recompute(subject: Subject) -> str:
    settings = ActivationSettings.from_args(subject.args).recompute
    return settings.method and "full" or " ".join(sorted(settings.modules)) or "none"


def _but_micro_batch(layout: costs.Layout) -> costs.Layout:
    """Layouts that differ in the micro-batch alone are one proposal: the model of time hardly tells them apart."""
    return replace(layout, micro_batch=1)
