#!/usr/bin/env python3
"""Pretrains a hybrid language model: flags -> recipe -> pattern -> model -> megatron.training.pretrain().

python pretrain_hybrid.py --list-recipes
python pretrain_hybrid.py --recipe paper-1b-intra --print-config
torchrun --nproc_per_node 2 pretrain_hybrid.py --recipe demo --data-path PREFIX ...any Megatron flag...
"""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_hybrid.cli import flags, report
from megatron_hybrid.errors import upstream_errors_as_value_errors
from megatron_hybrid.run_folder.checkpoints import Unreachable

PATIENCE_S = 30.0
"""How long other ranks wait for the first to say what is wrong with the flags."""


def main(argv: list[str]) -> None:
    """Runs one training process. A mistake in the flags ends it with one paragraph and exit code 2."""
    if "--list-recipes" in argv:
        print(report.list_recipes())
        return
    if not {"--help", "-h"}.isdisjoint(argv):
        from megatron_hybrid.cli import arguments

        print(arguments.help_text())
        return
    try:
        command = flags.resolve(argv)
        from megatron_hybrid.checkpoint import resume
        from megatron_hybrid.cli import arguments, connections
        from megatron_hybrid.patches import upstream
        from megatron_hybrid.training import data_checks, throughput

        connected = connections.set_connections(command.argv)
        device = arguments.choose_device(command.device)
        command = arguments.balance(command, device)
        args = arguments.parse(command.argv, device, command.print_config)
        args.notes += connected if device == "cuda" else []
        args.notes += resume.choose_checkpoint(args, alone=command.print_config)
        arguments.check_checkpoint(args, command.print_config)
        args.notes += [] if command.print_config else data_checks.check_data_content(args)
        if args.reset_attention_mask and not command.print_config:
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

    from megatron_hybrid.model.stack import HybridLayerStack

    notes = upstream.prepare(device, HybridLayerStack) + args.notes + throughput.peak_notes(args, peak)
    if args.rank == 0:
        if command.print_config:
            print(report.describe(args, command, counted, drawn))
        else:
            print(report.announce(args, command, notes, drawn), flush=True)
    if command.print_config:
        return
    from megatron_hybrid.checkpoint.unpickling import Refused

    try:
        train(args, config, counted, peak)
    except Refused as error:  # an index cache, or a checkpoint that changed meanwhile
        refuse(error, 2)


def refuse(error: Exception, code: int) -> NoReturn:
    """Ends this process with what is wrong, which one rank says for all of them.

    code: 2 for a mistake, 1 for what may be well at the next start.

    The others give way: torchrun ends all ranks when one has gone, and the first may still be importing. A rank
    that is still there afterwards made a mistake of its own, such as a file that its node lacks.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(PATIENCE_S)
    print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    sys.exit(code)


def train(args: Namespace, config: Any, counted: dict[str, Any], peak: Any = None) -> None:
    """Hooks our figures into Megatron and hands over.

    config: the model's; counted: stored with the run; peak: of one GPU (:func:`.engine.throughput.peak`).
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_hybrid import costs, pattern
    from megatron_hybrid.checkpoint import saving
    from megatron_hybrid.layers import registry
    from megatron_hybrid.training import bad_steps, ending, metrics, micro_batches, validation

    layers, sizes = pattern.parse(args.hybrid_layer_pattern), costs.sizes_of(args)
    flops = partial(costs.training_flops, layers, sizes)
    micro_batches.count_flops_with(flops)
    micro_batches.draw_batches_that_are_skipped()
    run = Path(args.save) if args.save and not args.skip_train else None  # an evaluation leaves the run's files alone
    metrics.write_metrics(run / "metrics.jsonl" if run else None, flops, peak, registry.measured(args))
    if run:
        micro_batches.write_run(run / "run.json", args, counted)
    saving.guard_saves(args)
    build = validation.validate_on_whole_sets(args, datasets) if args.full_validation else datasets
    provider: Any = bad_steps.watch_steps(run, args, build)
    provider.is_distributed = True
    ending.spare_helpers_the_signal()
    with ending.state_of_the_run(run, args):
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )


def datasets(samples: Sequence[int | None], vp_stage: int | None = None, whole: bool = False) -> Any:
    """Train, validation and test sets for the wanted numbers of samples.

    whole: the validation and test sets are all samples of their data, each once, whatever the weights of a blend.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import get_blend_and_blend_per_split

    from megatron_hybrid.training import validation
    from megatron_hybrid.training.gpt_dataset import ContentGPTDataset, ContentGPTDatasetConfig, NotBuilt

    args = get_args()
    tokenizer = build_tokenizer(args)
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = ContentGPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        object_storage_cache_path=args.object_storage_cache_path,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=False,  # and no attention mask: documents are told apart in next_batch
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        contents=args.data_contents,
    )
    kind = MockGPTDataset if args.mock_data else ContentGPTDataset

    def build(sizes: Sequence[int | None], config: Any) -> Any:
        try:
            return BlendedMegatronDatasetBuilder(kind, sizes, partial(reads_data, vp_stage), config).build()
        except NotBuilt as error:
            refuse(error, 2)

    if not whole:
        return build(samples, config)
    train, rest = validation.split_config(config)
    return [build([samples[0], 0, 0], train)[0], *build([None, None, None], rest)[1:]]


def reads_data(vp_stage: int | None) -> bool:
    """Whether this rank loads samples: the first rank of each tensor-parallel group, at both pipeline ends.

    With packed documents that is every stage: a stage in the middle takes the boundaries from the tokens.
    """
    from megatron.core import mpu
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    stage_reads = is_first_or_last_pipeline_stage(vp_stage) or get_args().reset_attention_mask
    return stage_reads and mpu.get_tensor_model_parallel_rank() == 0


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """One micro-batch: per-token losses [b, s], and the function that reduces them."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_hybrid.training.micro_batches import next_batch

    batch = next_batch(data_iterator, model)
    documents = batch["documents"]
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=None if documents is None else PackedSeqParams(qkv_format="sbhd", seq_idx=documents),
    )
    return losses, partial(loss, batch["loss_mask"])


def loss(mask: Any, losses: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Sum of the losses under the mask, number of tokens, and both for the log.

    Upstream divides the first by the second and averages over context-parallel ranks
    (core/pipeline_parallel/schedules.py:331), which is no mean over tokens where the mask leaves the ranks different
    numbers of them. So the number is that of the whole samples, and the sum is scaled by the number of ranks: the
    quotients' average is what one process computes. Under --calculate-per-token-loss upstream sums both over all ranks.

    Args:
        mask: 1.0 for each token whose loss counts, float32 [b, s / cp].
        losses: Of each token, [b, s / cp].
    """
    import torch
    from megatron.core import mpu
    from megatron.training import get_args

    total = (losses.view(-1).float() * mask.view(-1)).sum()
    tokens = mask.sum()
    log = {"lm loss": torch.stack([total.detach(), tokens])}
    if mpu.get_context_parallel_world_size() > 1 and not get_args().calculate_per_token_loss:
        tokens = tokens.clone()
        torch.distributed.all_reduce(tokens, group=mpu.get_context_parallel_group())
        total = total * mpu.get_context_parallel_world_size()
    return total, tokens.int(), log


if __name__ == "__main__":
    main(sys.argv[1:])
