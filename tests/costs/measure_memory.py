"""What the ranks of the memory tests run: bytes of a real model and its optimizer beside those that costs/ counts."""

from collections.abc import Iterable
from typing import Any

from tests.support.training import Run


def measured_and_counted(pattern: str, flags: str) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Sets up a model, trains one step, and counts.

    Returns:
        Bytes of ``parameters``, ``gradients`` and ``optimizer`` on this rank: measured, as the storages of the tensors;
        counted for this rank; and those of the largest one. And by ``stage`` the number of parameters, twice.
    """
    import torch
    from megatron.core import mpu

    from megatron_hybrid import costs
    from megatron_hybrid.accounting.storage import Storage
    from megatron_hybrid.costs import memory
    from megatron_hybrid.pattern import parse

    run = Run(pattern, flags)
    run.step()
    model = [p for chunk in run.model for p in chunk.parameters()]
    buffers = [b for chunk in run.model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    measured = {
        "parameters": _bytes(model),
        "gradients": _bytes(b.grad_data for b in buffers),
        "optimizer": _bytes(_optimizer_tensors(run.optimizer), besides=model),
        "count": sum(p.numel() for p in model),
    }
    args = run.args
    what = parse(args.hybrid_layer_pattern), costs.sizes_of(args), costs.Layout.from_args(args)
    stage = mpu.get_pipeline_model_parallel_rank()
    # Megatron's order of ranks has the pipeline outside of all others
    rank = torch.distributed.get_rank() % (what[2].world // what[2].pp)
    found = memory.rank_memory(*what, Storage.from_args(args), stage, rank)
    largest = memory.largest_rank(*what, Storage.from_args(args))
    counted = {**_as_dict(found), "count": memory.stage_parameters(*what, stage).total}
    return measured, counted, _as_dict(largest)


def _as_dict(found: Any) -> dict[str, int]:
    return {name: getattr(found, name) for name in ("parameters", "gradients", "optimizer")}


def _optimizer_tensors(optimizer: Any) -> Iterable[Any]:
    """Main parameters and state of an optimizer made of several."""
    import torch

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (t for t in state.values() if torch.is_tensor(t))


def _bytes(tensors: Iterable[Any], besides: Iterable[Any] = ()) -> int:
    """Of the storages of tensors, each once, without those of others."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    others = {t.untyped_storage().data_ptr() for t in besides}
    return sum(size for start, size in storages.items() if start not in others)
