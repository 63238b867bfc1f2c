"""What each rank gets of a micro-batch, and the FLOPs of a step."""

from typing import Any

import pytest

from tests.support.training import EOD, Run


def flops(pattern: str) -> tuple[float, float]:
    """What Megatron counts for a step of 4 samples, and what costs.py does."""
    from functools import partial

    from megatron.training import training

    from megatron_hybrid import costs
    from megatron_hybrid import pattern as language
    from megatron_hybrid.patches.hooks import install_hooks
    from megatron_hybrid.patches.patching import uninstall_run
    from megatron_hybrid.training.micro_batches import count_flops

    args = Run(pattern).args
    layers, sizes = language.parse(pattern), costs.sizes_of(args)
    install_hooks({"count_flops": count_flops(partial(costs.training_flops, layers, sizes))})
    counted = training.num_floating_point_operations(
        args, 4, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None
    )
    uninstall_run()
    return counted, costs.training_flops(layers, sizes, 4)


def test_megatrons_flops_are_ours(ranks):
    counted, expected = ranks(1).run(flops, pattern="M-P-W-")[0]
    assert counted == expected > 0


def batch(pattern: str, flags: str, eod_at: tuple[int, ...] = ()) -> dict[str, Any]:
    """What next_batch gives this rank of one sample: tokens t, labels t + 1, a mask that is 0 at each third token.

    Documents end at the positions ``eod_at``.
    """
    import torch

    from megatron_hybrid.training.micro_batches import next_batch
    from megatron_hybrid.training.provider import reads_data

    run = Run(pattern, flags)
    length = run.args.seq_length
    tokens = torch.arange(length)[None]
    tokens[:, list(eod_at)] = EOD
    mask = (tokens % 3 != 0).float()
    sample = {"tokens": tokens, "labels": tokens + 1, "loss_mask": mask, "position_ids": tokens.clone()}
    reads = reads_data(None)
    found = next_batch(iter([sample]) if reads else None, run.model[0])
    return {name: value if value is None else value.tolist() for name, value in found.items()}


def _samples(tokens: list[int]) -> dict[str, list]:
    """The batch of batch at these positions."""
    return {
        "tokens": [tokens],
        "labels": [[t + 1 for t in tokens]],
        "loss_mask": [[float(t % 3 != 0) for t in tokens]],
        "position_ids": [tokens],
        "documents": None,
    }


def test_tensor_parallel_ranks_get_one_readers_batch(ranks):
    flags = "--tensor-model-parallel-size 2 --sequence-parallel"
    assert ranks(2).run(batch, pattern="M-", flags=flags) == [_samples(list(range(32)))] * 2


def test_context_parallel_ranks_get_their_zigzag_chunks(ranks):
    first, second = ranks(2).run(batch, pattern="M-", flags="--context-parallel-size 2")
    assert first == _samples([*range(8), *range(24, 32)])
    assert second == _samples([*range(8, 24)])


def test_pipeline_stages_get_what_they_use(ranks):
    whole = _samples(list(range(32)))
    first, last = ranks(2).run(batch, pattern="M-|M-", flags="--pipeline-model-parallel-size 2")
    assert first == {**whole, "labels": None, "loss_mask": None}
    assert last == {**whole, "tokens": None, "position_ids": None}


@pytest.mark.parametrize(
    "flags",
    [
        "--pipeline-model-parallel-size 4",
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ],
)
def test_every_rank_of_every_stage_gets_the_documents_of_whole_samples(ranks, flags):
    pattern = "M-|M-|M-|M-" if "size 4" in flags else "M-"
    found = ranks(4).run(batch, pattern=pattern, flags=f"{flags} --reset-attention-mask", eod_at=(4, 5, 31))
    assert [batch["documents"] for batch in found] == [[[0] * 5 + [1] + [2] * 26]] * 4
    if "size 4" in flags:
        assert all(batch["tokens"] is batch["labels"] is None for batch in found[1:3])
