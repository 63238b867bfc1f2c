"""The auxiliary losses of routers in the log: every layout's are one process's, also of stages without experts."""

from typing import Any

import pytest

from tests.model.test_layouts import DP, EP2, PP2, SP, TP2
from tests.support.training import Run

AUX = """--moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss --moe-aux-loss-coeff 1e-1 2e-1 3e-1
--moe-z-loss-coeff 1e-2"""
LOSSES = ["load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss"]


def logged(pattern: str, flags: str, load: str = "") -> dict[str, Any]:
    """This rank's ``steps`` (losses and gradient norms), and what it would log of the routers at each, by name."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_hybrid.patches.routers import number_routers_of_heads

    class Writer(dict):
        def add_scalar(self, name: str, value: Any, iteration: int) -> None:
            self[name] = float(value)

    run = Run(pattern, f"{flags} --load {load} --no-load-optim --no-load-rng --finetune" if load else flags)
    number_routers_of_heads(run.model)
    found: dict[str, Any] = {"steps": [], "logged": []}
    for _ in range(2):
        found["steps"].append(run.step())
        found["logged"].append(Writer())
        get_moe_metrics_tracker().report(  # as training/training.py:2780
            loss_scale=run.args.micro_batch_size * run.args.data_parallel_size / run.args.global_batch_size,
            iteration=run.iteration,
            writer=found["logged"][-1],
            wandb_writer=None,
            per_layer_logging=True,
            force_initialize=True,
            track_names=LOSSES,
            num_layers=pattern.count("E"),
            moe_layer_freq=1,
            mtp_num_layers=run.args.mtp_num_layers,
            pg_collection=None,
            total_loss_dict={},
        )
        found["logged"][-1] = dict(found["logged"][-1])
    return found


@pytest.fixture(scope="module")
def one_process(ranks, reference):
    """``one_process(pattern)``: the weights to start from, and what one process logs."""
    known: dict[str, tuple[str, dict]] = {}

    def of(pattern: str) -> tuple[str, dict]:
        if pattern not in known:
            where, _ = reference(pattern, f"{DP} {AUX}".replace("\n", " "))
            known[pattern] = where, ranks(1).run(logged, pattern=pattern, flags=f"{DP} {AUX}", load=where)[0]
        return known[pattern]

    return of


LAYOUTS = {
    "last stage without experts": (2, "ME*E|M-", PP2),
    "with tensor parallelism": (4, "ME*E|M-", f"{PP2} {TP2} {SP}"),
    "with expert parallelism": (4, "ME*E|M-", f"{PP2} {EP2}"),
    "first stage without experts, heads": (2, "M-|*EE-/ME/ME", PP2),
    "segments without experts, heads": (2, "M|-*|E|E-/ME/ME", PP2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_logs_what_one_process_logs(ranks, one_process, name):
    size, pattern, flags = LAYOUTS[name]
    where, expected = one_process(pattern.replace("|", ""))
    for rank, found in enumerate(ranks(size).run(logged, pattern=pattern, flags=f"{DP} {AUX} {flags}", load=where)):
        # the loss over all replicas depends on their number, and with it all that follows
        replicas = EP2 in flags
        steps = 1 if replicas else 2
        for ours, theirs in zip(found["steps"][:steps], expected["steps"], strict=False):
            assert ours[: 1 if replicas else 2] == pytest.approx(theirs[: 1 if replicas else 2], rel=1e-5)
        for ours, theirs in zip(found["logged"][:steps], expected["logged"], strict=False):
            for title in [t for t in theirs if not (replicas and "global" in t)]:
                assert ours[title] == pytest.approx(theirs[title], rel=1e-4, abs=1e-9), f"rank {rank}, {title}"


@pytest.mark.parametrize(("pattern", "layers"), [("ME*EM-", [1, 3]), ("M-*EE-/ME/ME", [3, 4, 7, 9])])
def test_means_are_over_the_layers_with_experts(one_process, pattern, layers):
    for found in one_process(pattern)[1]["logged"]:
        for name in LOSSES:
            of_layers = {i: found[f"moe/{name}_layer_{i}"] for i in range(len(pattern.replace("/", "")))}
            assert [i for i, value in of_layers.items() if value] == layers
            assert found[name] == pytest.approx(sum(of_layers.values()) / len(layers), rel=1e-6)
            assert len(set(of_layers.values())) == len(layers) + 1, "layers that are alike would hide a wrong place"
