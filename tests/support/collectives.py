"""What ranks run to count their communication."""

import math
from typing import Any

KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::allgather_": "all_gather of a list",
}


def of_one_layer(symbol: str, flags: str) -> dict[str, int]:
    """Calls of process groups in one layer's forward and backward pass by kind, and the elements of all-reduces."""
    import torch

    from tests.support.training import Run

    run = Run(symbol, flags)
    layer = run.model[0].module.decoder.layers[0].train()
    x = torch.randn(16, 1, run.args.hidden_size, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        y = layer(hidden_states=x, attention_mask=None)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.randn_like(y))
    found: dict[str, int] = {}
    last = ""
    for event in profile.events():
        if event.name.startswith("c10d::"):
            last = KINDS[event.name]
            found[last] = found.get(last, 0) + 1
        elif event.name == "gloo:all_reduce" and last == "all_reduce":
            found["all_reduce elements"] = found.get("all_reduce elements", 0) + math.prod(event.input_shapes[0])
    return found


def alphas(pattern: str, flags: str, load: str) -> dict[str, float]:
    """The logged mean weight of the second branch, after two steps from saved weights."""
    from megatron_hybrid.layers.intra.fusion import mean_alphas
    from tests.support.training import Run

    run = Run(pattern, f"--load {load} --no-load-optim --no-load-rng --finetune {flags}")
    for _ in range(2):
        run.step()
    found = mean_alphas(run.model)["intra_alpha"]
    assert mean_alphas(run.model)["intra_alpha"] == {}  # counted once
    return found


def shared_parameters(pattern: str, flags: str, steps: int) -> dict[str, Any]:
    """Parameters that ranks have in common, freshly initialised and after some steps."""
    from tests.support.training import Run

    run = Run(pattern, flags)
    marked = {n for chunk in run.model for n, p in chunk.named_parameters() if getattr(p, "sequence_parallel", False)}
    found = {f"fresh {n}": v for n, v in run.parameters().items() if n.split(".", 1)[1] in marked}
    for _ in range(steps):
        run.step()
    return found | {n: v for n, v in run.parameters().items() if n.split(".", 1)[1] in marked}
