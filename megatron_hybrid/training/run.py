"""A run: its hooks in Megatron's training loop, and the loop itself."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hybrid import costs, pattern
from megatron_hybrid.checkpoint import resume, saving
from megatron_hybrid.layers import registry
from megatron_hybrid.patches import child_processes, hooks
from megatron_hybrid.run_folder.run_info import write_run
from megatron_hybrid.training import bad_steps, ending, metrics, micro_batches, validation
from megatron_hybrid.training.loss import forward_step
from megatron_hybrid.training.provider import datasets
from megatron_hybrid.training.throughput import Peak


def train(
    args: Namespace,
    config: Any,
    counted: dict[str, Any],
    peak: Peak | None = None,
    more: Mapping[str, hooks.Wrapper] | None = None,
) -> None:
    """Hooks into Megatron what the run measures, checks and saves, and trains.

    Args:
        args: Megatron's global arguments, in a prepared process (:func:`megatron_hybrid.patches.upstream.prepare`).
        config: The model's.
        counted: Stored with the run.
        peak: Of one GPU.
        more: Hooks of the caller's.
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    run = Path(args.save) if args.save and not args.skip_train else None  # an evaluation leaves the run's files alone
    provider, given = _hooks(args, run, peak)
    if run:
        write_run(run / "run.json", args, counted)
    hooks.install_hooks({**given, **(more or {})})
    child_processes.block_sigterm_in_children()
    with ending.state_of_the_run(run, args):
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )


def _hooks(args: Namespace, run: Path | None, peak: Peak | None) -> tuple[Callable, dict[str, hooks.Wrapper]]:
    """The provider of data sets, and the hooks of the run; their order is that of :data:`.hooks.HOOKS`."""
    layers, sizes = pattern.parse(args.hybrid_layer_pattern), costs.sizes_of(args)
    flops = partial(costs.training_flops, layers, sizes)
    given: dict[str, hooks.Wrapper] = {
        "count_flops": micro_batches.count_flops(flops),
        "draw_skipped_batch": micro_batches.draw_skipped_batch,
        **metrics.write_metrics(run / "metrics.jsonl" if run else None, flops, peak, registry.measured(args)),
        **saving.guard_saves(args),
    }
    if args.checkpoint:
        given["verify_others"] = resume.verify_others(args.checkpoint)
    build: Callable = datasets
    if args.full_validation:
        build, more = validation.validate_on_whole_sets(args, build)
        given |= more
    provider, more = bad_steps.watch_steps(run, args, build)
    given |= more
    provider.is_distributed = True  # type: ignore[attr-defined]
    return provider, given
