"""The auxiliary losses of routers in the log: those that one process would log, in every layout."""

from argparse import Namespace
from typing import Any

from megatron_hybrid.training.expert_loads import layers_of_experts, routers

TYPES = {
    "load_balancing_loss": "aux_loss",
    "seq_load_balancing_loss": "seq_aux_loss",
    "global_load_balancing_loss": "global_aux_loss",
}
"""Names in the log to those of ``--moe-router-load-balancing-type``; ``z_loss`` stands beside any of them."""


def log_router_losses_of_all_layers() -> None:
    """Makes all ranks reduce the same layers' losses, and the log's means be over the layers that have experts.

    Upstream (core/transformer/moe/moe_logging.py:119, :277) adds a value for each layer of the model where a router
    records, and one for each ``E`` where a stage has none (training/training.py:2766): ranks reduce unequal lengths,
    upon which Gloo aborts and NCCL waits for ever, and a stage without routers does not know over which ranks it has to
    sum. Its mean is over the ``E`` layers and as many again as there are prediction heads (:309). A head's second layer
    lies beyond its list. Here each rank has a place for every layer of model and heads, and knows the groups.
    """
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
    from megatron.training.global_vars import get_args

    record, report = MoEMetricsTracker.record, MoEMetricsTracker.report
    if record.__module__ == __name__:
        return

    def record_in_place(self: Any, name: str, value: Any, layer_number: int, num_layers: int, **options: Any) -> None:
        record(self, name, value, layer_number, _places(get_args()), **options)

    def report_all(self: Any, *, track_names: list[str], **options: Any) -> str:
        import torch

        args = get_args()
        layers = layers_of_experts(args)
        types = args.moe_router_load_balancing_type
        types = [types] if isinstance(types, str) else types  # upstream looks for "aux_loss" in "seq_aux_loss", too
        names = [name for name in track_names if TYPES.get(name) in (None, *types)]
        if not layers:
            return ""
        nothing = torch.zeros((), device=torch.cuda.current_device())
        for name in names:
            record(self, name, nothing, 1, _places(args), **_groups(name))
        options |= {"num_layers": len(layers), "moe_layer_freq": None, "mtp_num_layers": None}
        return report(self, track_names=names, **options | {"force_initialize": False})

    MoEMetricsTracker.record, MoEMetricsTracker.report = record_in_place, report_all


def number_routers_of_heads(chunks: list) -> None:
    """Gives the layers of prediction heads numbers of their own (core/transformer/moe/router.py:582).

    Upstream counts each head's from 1 again, and adds up the losses of layers with the same number in its log.

    Args:
        chunks: The model's parts on this rank, before the first step.
    """
    from megatron.training.global_vars import get_args

    _, *heads = get_args().hybrid_layer_pattern.split("/")
    for name, router in routers(chunks):
        if name.startswith("mtp"):
            head, layer = map(int, name.removeprefix("mtp ").split("."))
            router.set_layer_number((head - 1) * len(heads[0]) + layer)


def _places(args: Namespace) -> int:
    """Layers of the model and of all heads."""
    return sum(len(part) for part in args.hybrid_layer_pattern.replace("|", "").split("/"))


def _groups(name: str) -> dict[str, Any]:
    """Over which ranks a router sums or averages its loss: core/transformer/moe/router.py, each of its losses."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups(["tp_cp", "tp_dp_cp"])
    if name == "z_loss":
        return {"avg_group": groups.tp_dp_cp}
    if name == "global_load_balancing_loss":
        return {"reduce_group": groups.tp_dp_cp, "needs_dp_avg": False}
    return {"reduce_group": groups.tp_cp}
