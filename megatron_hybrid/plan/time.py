"""Seconds of a step on GPUs: an explained model, for ranking layouts and for a first estimate.

A step is the sum of

- **compute**: the FLOPs that run (training FLOPs, and forward passes that recomputation repeats) at ``efficiency``
  times the GPU's dense peak, spread evenly over tensor- and context-parallel ranks, experts evenly loaded; under
  ``--fp8-format`` linear layers at ``EIGHT_BIT_EFFICIENCY`` of that share of the peak in 8 bits;
- **messages** of tensor, context, expert and pipeline groups: the bytes that a rank sends over the bandwidth of the
  slowest link in the group, none of it hidden behind compute;
- **the pipeline**: the schedule of these passes over unequal stages, bubble included;
- **once a step**: gradients and parameters between replicas - with ``--overlap-grad-reduce`` only what a micro-batch's
  compute cannot hide - and the optimizer, which reads and writes its state once.

Not in it: kernels that are slower for some layers than for others, launch overheads of small micro-batches, ring
latencies, contention, uneven routing of experts. Choose ``efficiency`` from a run of your own: the MFU that its log
reports with few GPUs.
"""

import math
from dataclasses import dataclass

from megatron_hybrid import costs
from megatron_hybrid.accounting.activation_settings import Recompute
from megatron_hybrid.accounting.traffic import CommunicationSettings, Group, Traffic
from megatron_hybrid.costs.communication import step_communication
from megatron_hybrid.costs.hardware import RESERVE, Gpu
from megatron_hybrid.costs.memory import rank_memory
from megatron_hybrid.costs.schedule import pipeline_time
from megatron_hybrid.layers.registry import account
from megatron_hybrid.plan.subject import Subject

EFFICIENCY = 0.40
"""Of the dense peak: about what is published for a dense hybrid of 4 billion parameters (Nemotron-3 Nano 4B) on 8 H100,
402.5 TFLOP/s per GPU, 40.7% of 989. Steps of this code on one H100 had 23% to 39% (docs/benchmarks/h100)."""
EIGHT_BIT_EFFICIENCY = 0.63
"""Of ``efficiency``, what 8-bit products reach of their own peak, quantising included: as if 1.26 times as fast as in
bf16. It makes the one pair of runs that was measured agree: ``paper-1b-llama`` on one H200 with ``--backend te``, 1.263
s a step in bf16, 1.099 s with ``--fp8-format hybrid --fp8-recipe tensorwise``."""
NETWORK = 50e9
"""Bytes per second of one GPU between nodes: a port of 400 Gb/s for each GPU, as NVIDIA's DGX H100 has."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs that a plan is for."""

    title: str
    peak: float
    """Dense FLOP/s in the precision of the run."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes per second."""
    nvlink: float
    """Bytes per second of one GPU inside a node, in one direction."""
    network: float = NETWORK
    """The same between nodes."""
    gpus_per_node: int = 8
    nvlink_gpus: int = 8
    """Joined at ``nvlink``; beyond them inside a node ``network`` is taken too."""
    efficiency: float = EFFICIENCY
    eight_bit_peak: float | None = None
    """Dense FLOP/s in 8 bits; None: not known, or there are none."""

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"--efficiency {self.efficiency:g} is a share of the peak: give one above 0, at most 1.")
        figures = {
            "--peak-tflops": self.peak,
            "--memory-gib": self.memory,
            "--memory-bandwidth": self.bandwidth,
            "--nvlink-gbps": self.nvlink,
            "--network-gbps": self.network,
            "--gpus-per-node": self.gpus_per_node,
        }
        for flag, value in figures.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{flag} must be a number above 0.")

    @property
    def limit(self) -> float:
        """Bytes that a rank may take."""
        return (1 - RESERVE) * self.memory

    @classmethod
    def of(cls, gpu: Gpu, precision: str, **changes: float | None) -> "Machine":
        """A known GPU; figures that are given win.

        Raises:
            ValueError: The GPU has no such precision, its links are not known and not given, or a figure is not
                above 0.
        """
        known = {
            "title": gpu.title,
            "peak": gpu.peak(precision),  # type: ignore[arg-type]
            "memory": gpu.capacity,
            "bandwidth": gpu.bandwidth,
            "nvlink": gpu.nvlink,
            "nvlink_gpus": gpu.nvlink_gpus,
            "eight_bit_peak": gpu.peaks.get("fp8"),
        }
        if changes.get("nvlink") is not None:
            known["nvlink_gpus"] = changes.get("gpus_per_node") or cls.gpus_per_node
        made = known | {name: value for name, value in changes.items() if value is not None}
        if made["nvlink"] is None:
            raise ValueError(f"{gpu.title}: the links inside a node depend on the machine. Give --nvlink-gbps.")
        return cls(**made)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, of the slowest rank where they differ."""

    pipeline: float
    """All micro-batches, from the first forward pass to the last backward pass."""
    data: float
    """Gradients and parameters between replicas, as far as compute does not hide it."""
    optimizer: float
    compute: float
    """Of ``pipeline``: the busiest stage's products."""
    messages: float
    """Of ``pipeline``: the same stage's messages."""
    bubble: float
    """Share of ``pipeline`` in which ranks wait for others, their mean."""

    @property
    def total(self) -> float:
        return self.pipeline + self.data + self.optimizer


def spans(layout: costs.Layout) -> dict[Group, int]:
    """Neighbouring ranks that a group reaches over, in Megatron's order: tensor, context, expert, data, pipeline."""
    stage = layout.world // layout.pp
    return {
        "tensor": layout.tp,
        "context": layout.tp * layout.cp,
        "expert tensor": layout.etp,
        "expert": layout.etp * layout.ep,
        "data": stage,
        "expert data": stage,
        "pipeline": layout.world,
        "embedding": layout.world,
    }


def step_time(subject: Subject, machine: Machine) -> StepTime:
    """Seconds of one step of a run; see the module for what is in it.

    Raises:
        ValueError: Something in the flags is not counted.
    """
    s, layout = subject, subject.layout
    settings = CommunicationSettings.from_args(s.args)
    reach = spans(layout)

    def seconds(group: Group, traffic: Traffic) -> float:
        inside = reach[group] <= min(machine.gpus_per_node, machine.nvlink_gpus)
        return traffic.bytes / (machine.nvlink if inside else machine.network)

    rate = machine.peak * machine.efficiency
    tokens = layout.micro_batch * s.sizes.seq_length / (layout.tp * layout.cp)
    work = costs.segment_work(s.pattern, s.sizes)
    segments = s.pattern.segments
    less = _less_in_8_bits(machine) if settings.storage.eight_bit else 0.0
    forward, backward, once, compute, messages = [], [], 0.0, [], []
    sent = [step_communication(s.pattern, s.sizes, layout, settings, stage) for stage in range(layout.pp)]
    for i, part in enumerate(work):
        traffic = sent[i % layout.pp]
        here = sum(seconds(g, t) for g, t in traffic.items() if g not in ("data", "expert data", "embedding"))
        message = here / layout.micro_batches / layout.vpp
        again = recomputed_flops(segments[i], s.sizes, settings.recompute)
        flops = part.total
        if less:  # as many FLOPs of the run's precision as take that long
            flops -= less * eight_bit_flops(s, segments[i], last=i == len(work) - 1)
            again -= less * eight_bit_flops(s, recomputed_layers(segments[i], settings.recompute))
        ahead, back = flops * tokens / rate, (2 * flops + again) * tokens / rate
        # a third of the messages are the forward pass's, as of the FLOPs: only their sum matters to the schedule
        forward.append(ahead + message / 3)
        backward.append(back + message * 2 / 3)
        compute.append(ahead + back)
        messages.append(message)
    for traffic in sent:
        once = max(once, sum(seconds(g, t) for g, t in traffic.items() if g in ("data", "expert data", "embedding")))
    if s.args.overlap_grad_reduce:
        once = max(0.0, once - min(compute))
    time = pipeline_time(forward, backward, layout.micro_batches, layout.vpp)
    busy = [
        sum(x[stage :: layout.pp]) * layout.micro_batches for x in (compute, messages) for stage in range(layout.pp)
    ]
    products, sending = busy[: layout.pp], busy[layout.pp :]
    slowest = max(range(layout.pp), key=lambda stage: products[stage] + sending[stage])
    return StepTime(
        pipeline=time,
        data=once,
        optimizer=_optimizer(s, machine, settings),
        compute=products[slowest],
        messages=sending[slowest],
        bubble=max(0.0, 1 - sum(busy) / (layout.pp * time)),
    )


def _less_in_8_bits(machine: Machine) -> float:
    """The share of a product's time that 8 bits save.

    Raises:
        ValueError: The GPU has no peak in 8 bits that is known.
    """
    if machine.eight_bit_peak is None:
        raise ValueError(
            f"--fp8-format: {machine.title} has no peak in 8 bits that is known. Drop it, or take an H100."
        )
    return 1 - machine.peak / (machine.eight_bit_peak * EIGHT_BIT_EFFICIENCY)


def eight_bit_flops(s: Subject, layers: str, last: bool = False) -> float:
    """Forward FLOPs per token of the products in 8 bits of layers, and with ``last`` of the prediction heads."""
    depths = s.pattern.mtp_depths if last else 0
    tp = s.layout.tp
    of_layers = sum(account(symbol).eight_bit_flops(s.sizes, tp) for symbol in layers + s.pattern.mtp * depths)
    return of_layers + depths * 4 * s.sizes.hidden**2


def _optimizer(s: Subject, machine: Machine, settings: CommunicationSettings) -> float:
    """Each byte of optimizer state is read and written once, each of gradients and parameters touched once."""
    most = 0.0
    for stage in range(s.layout.pp):
        held = rank_memory(s.pattern, s.sizes, s.layout, settings.storage, stage)
        most = max(most, (2 * held.optimizer + held.gradients + held.parameters) / machine.bandwidth)
    return most


def recomputed_flops(layers: str, sizes: costs.Sizes, recompute: Recompute) -> float:
    """Forward FLOPs per token of a segment that are run again in the backward pass."""
    again = sum(costs.layer_flops_per_token(symbol, sizes) for symbol in recomputed_layers(layers, recompute))
    return again + sum(account(symbol).recomputed_flops(sizes, recompute.modules) for symbol in layers)


def recomputed_layers(layers: str, recompute: Recompute) -> str:
    """Layers of a segment that are run again as a whole."""
    return {"uniform": layers, "block": layers[: recompute.layers]}.get(recompute.method or "", "")
