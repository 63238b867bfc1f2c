"""Patches of MoE routers: tokens counted for each expert, and in every layout the losses that one process would log."""

import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.patches.patching import Patch, Table

COUNTER = "tokens_of_experts"
"""Attribute of a router: its rank's tokens of each expert since they were read, int64 [experts]."""

TYPES = {
    "load_balancing_loss": "aux_loss",
    "seq_load_balancing_loss": "seq_aux_loss",
    "global_load_balancing_loss": "global_aux_loss",
}
"""Names in the log to those of ``--moe-router-load-balancing-type``; ``z_loss`` stands beside any of them."""


def record_in_place_of_all_layers(record: Callable) -> Callable:
    """Gives a rank a place for every layer of model and heads.

    Upstream adds a value for each layer of the model where a router records: a head's second layer lies beyond its
    list.
    """

    def record_in_place(self: Any, name: str, value: Any, layer_number: int, num_layers: int, **options: Any) -> None:
        from megatron.training.global_vars import get_args

        record(self, name, value, layer_number, _places(get_args()), **options)

    return record_in_place


def log_router_losses_of_all_layers(report: Callable) -> Callable:
    """Makes all ranks reduce the same layers' losses, and the log's means be over the layers that have experts.

    Upstream (core/transformer/moe/moe_logging.py:119, :277) adds a value for each layer of the model where a router
    records, and one for each ``E`` where a stage has none (training/training.py:2766): ranks reduce unequal lengths,
    upon which Gloo aborts and NCCL waits for ever, and a stage without routers does not know over which ranks it has to
    sum. Its mean is over the ``E`` layers and as many again as there are prediction heads (:309). Here each rank
    records in every layer, by :func:`record_in_place_of_all_layers`, and knows the groups.
    """

    def report_all(self: Any, *, track_names: list[str], **options: Any) -> str:
        from megatron.training.global_vars import get_args

        args = get_args()
        layers = layers_of_experts(args)
        types = args.moe_router_load_balancing_type
        types = [types] if isinstance(types, str) else types  # upstream looks for "aux_loss" in "seq_aux_loss", too
        names = [name for name in track_names if TYPES.get(name) in (None, *types)]
        if not layers:
            return ""
        nothing = torch.zeros((), device=torch.cuda.current_device())
        for name in names:
            self.record(name, nothing, 1, _places(args), **_groups(name))
        options |= {"num_layers": len(layers), "moe_layer_freq": None, "mtp_num_layers": None}
        return report(self, track_names=names, **options | {"force_initialize": False})

    return report_all


def count_routed_tokens(upstreams: Callable) -> Callable:
    """Counts the tokens of each expert in routers that have a :data:`COUNTER`, with an expert bias or without.

    Upstream counts there for the bias alone, in float32, and sets the count to zero in each step; torch compiles that
    sum in the first step. As upstream does, a token is counted where gradients are on: once under recomputation, and
    not in an evaluation. With a capacity, what is dropped is not counted. The cost is one sum over the routing map of
    each micro-batch, without synchronisation.
    """

    def counting(self: Any, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        counted = self.training and hasattr(self, COUNTER)
        if not torch.is_grad_enabled() or not (counted or self.enable_expert_bias):
            return
        with torch.no_grad():
            # [tokens, experts]
            chosen = routing_map if padding_mask is None else routing_map & ~padding_mask.view(-1, 1)
            tokens = chosen.sum(dim=0)
            if self.enable_expert_bias:
                self.local_tokens_per_expert += tokens
            if counted:
                getattr(self, COUNTER).add_(tokens)

    return counting


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


def layers_of_experts(args: Namespace) -> list[str]:
    """The layers of experts in a model: "4" is the fourth of the pattern, "mtp 1.2" the second of the first head."""
    main, *heads = args.hybrid_layer_pattern.replace("|", "").split("/")
    heads = heads[:1] if args.mtp_use_repeated_layer else heads  # one set of weights for all
    names = [str(i + 1) for i, symbol in enumerate(main) if LAYERS[symbol].has_experts]
    return names + [
        f"mtp {h + 1}.{i + 1}" for h, head in enumerate(heads) for i, s in enumerate(head) if LAYERS[s].has_experts
    ]


def routers(chunks: list) -> list[tuple[str, Any]]:
    """The routers on this rank, with the names of their layers."""
    from megatron.core.transformer.moe.router import TopKRouter

    found = []
    for chunk in chunks:
        for path, module in chunk.named_modules():
            if isinstance(module, TopKRouter):
                # the path alone says which head a layer is in; its layer_number is that in the pattern
                head = re.search(r"\bmtp\.layers\.(\d+)\.mtp_model_layer\.layers\.(\d+)\.", path)
                name = f"mtp {int(head[1]) + 1}.{int(head[2]) + 1}" if head else str(module.layer_number)
                found.append((name, module))
    return found


_TRACKER = "megatron.core.transformer.moe.moe_logging:MoEMetricsTracker"
TABLE = Table(
    "routers",
    (
        Patch(
            _TRACKER,
            "record",
            record_in_place_of_all_layers,
            "layers of heads lie beyond the list of the model's layers",
            "core/transformer/moe/moe_logging.py:119",
            contract="log_router_losses_of_all_layers",
        ),
        Patch(
            _TRACKER,
            "report",
            log_router_losses_of_all_layers,
            "ranks reduce unequal lengths where a stage has no experts",
            "core/transformer/moe/moe_logging.py:130",
        ),
        Patch(
            "megatron.core.transformer.moe.router:TopKRouter",
            "_apply_expert_bias",
            count_routed_tokens,
            "tokens are counted for the expert bias alone",
            "core/transformer/moe/router.py:728",
            contract="count_tokens_of_experts",
        ),
    ),
)
