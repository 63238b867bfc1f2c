"""What each pipeline stage holds."""

from dataclasses import dataclass

from megatron_hybrid.pattern import Pattern, check_pipeline


@dataclass(frozen=True)
class Stage:
    """What one rank of the pipeline holds."""

    segments: tuple[str, ...]
    """Layers of each of its segments, in order."""
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the final norm, the output head, and the MTP heads."""

    @property
    def layers(self) -> str:
        return "".join(self.segments)


def stages(pattern: Pattern, pp: int) -> list[Stage]:
    """The pipeline stages of a pattern.

    Segment i belongs to stage i % pp, as upstream deals them out
    (core/models/hybrid/hybrid_layer_allocation.py, ``select_pipeline_segment``); without ``|`` each stage has the same
    number of layers.

    Raises:
        ValueError: The pattern does not divide over the stages.
    """
    check_pipeline(pattern, pp)
    segments = pattern.segments
    if len(segments) == 1:
        each = len(pattern.layers) // pp
        segments = tuple(pattern.layers[i * each : (i + 1) * each] for i in range(pp))
    return [Stage(segments[i::pp], first=i == 0, last=i == pp - 1) for i in range(pp)]
