#!/usr/bin/env python3
"""Pretrains a hybrid language model: flags -> recipe -> pattern -> model -> megatron.training.pretrain().

python pretrain_hybrid.py --list-recipes
python pretrain_hybrid.py --recipe paper-1b-intra --print-config
torchrun --nproc_per_node 2 pretrain_hybrid.py --recipe demo --data-path PREFIX ...any Megatron flag...
"""

import os
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

from megatron_hybrid.cli import flags, report
from megatron_hybrid.errors import upstream_errors_as_value_errors
from megatron_hybrid.patches.hooks import Wrapper
from megatron_hybrid.run_folder.checkpoints import Unreachable

PATIENCE_S = 30.0
"""How long other ranks wait for the first to say what is wrong with the flags."""


def main(argv: list[str], hooks: Mapping[str, Wrapper] | None = None) -> None:
    """Runs one training process. A mistake in the flags ends it with one paragraph and exit code 2.

    hooks: In Megatron's training loop, besides those of every run (:data:`megatron_hybrid.patches.hooks.HOOKS`).
    """
    if "--list-recipes" in argv:
        print(report.list_recipes())
        return
    try:
        if not {"--help", "-h"}.isdisjoint(argv):
            from megatron_hybrid.cli import arguments

            flags.load_layers([word for word in argv if word not in ("--help", "-h")])
            print(arguments.help_text())
            return
        command = flags.resolve(argv)
        from megatron_hybrid.checkpoint import compatibility, resume
        from megatron_hybrid.cli import arguments, connections, micro_batch_size
        from megatron_hybrid.patches import upstream
        from megatron_hybrid.training import data_checks, data_order, throughput

        connected = connections.set_connections(command.argv)
        device = arguments.choose_device(command.device)
        command = arguments.balance(command, device)
        command = micro_batch_size.for_this_device(command, device)
        args = arguments.parse(command.argv, device, command.print_config)
        args.notes += [*command.notes, *(connected if device == "cuda" else [])]
        args.notes += resume.choose_checkpoint(args, alone=command.print_config)
        stored = compatibility.check_checkpoint(args, command.print_config)
        if not command.print_config:
            args.notes += data_order.order_notes(stored, args)
            args.notes += data_checks.check_data_content(args, stored)
            data_checks.check_end_of_document(args)
        counted, drawn = report.figures(args), report.data_draws(args)
        peak = throughput.peak(args)
        from megatron_hybrid.model.build import model_config

        with upstream_errors_as_value_errors():
            config = None if command.print_config else model_config(args)
            arguments.check_configs(args, config)
    except ValueError as error:
        refuse(error, 2)
    except Unreachable as error:
        refuse(error, 1)

    from megatron_hybrid.model.loss_head import HybridLossModel
    from megatron_hybrid.model.stack import HybridLayerStack

    notes = upstream.prepare(device, HybridLayerStack, HybridLossModel, args.ssm_kernels)
    notes += args.notes + throughput.peak_notes(args, peak)
    if args.rank == 0:
        if command.print_config:
            print(report.describe(args, command, counted, drawn))
        else:
            print(report.announce(args, command, notes, drawn), flush=True)
    if command.print_config:
        return
    from megatron_hybrid.patches.unpickling import Refused
    from megatron_hybrid.training.gpt_dataset import NotBuilt
    from megatron_hybrid.training.run import train

    try:
        train(args, config, counted, peak, hooks)
    except (Refused, NotBuilt) as error:  # of an index cache, or a checkpoint that changed meanwhile
        refuse(error, 2)


def refuse(error: Exception, code: int) -> NoReturn:
    """Ends this process with an error message, which rank 0 prints for all ranks.

    Args:
        error: What is wrong.
        code: 2 for a user's mistake, 1 for what may succeed at the next start.

    The others wait first: torchrun ends all ranks when one has exited, and rank 0 may still be importing. A rank that
    is still there afterwards has an error of its own, such as a file that its node lacks.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(PATIENCE_S)
    print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
