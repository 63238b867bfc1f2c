"""What models are built and trained with: symbols, data set helpers, prediction heads, FLOPs, the meta device."""

from typing import Any

import pytest

from tests.patches.contract import UPSTREAM
from tests.support.training import MOE, SIZES, STEPS, Run, forget


def upstream_patterns(pattern: str) -> dict[str, Any]:
    """What upstream's own functions make of a pattern with our symbols."""
    from megatron.core.models.hybrid import hybrid_layer_allocation as allocation

    parsed = allocation.parse_hybrid_pattern(pattern)
    return {
        "main": parsed.main_pattern,
        "mtp": parsed.mtp_pattern,
        "depths": parsed.mtp_num_depths,
        "layers": allocation.get_hybrid_total_layer_count(pattern),
        "counts": allocation.get_hybrid_layer_counts(pattern),
        "symbols": allocation.Symbols.name_sorted_valid_layer_symbols(),
    }


def test_upstream_parses_and_counts_our_symbols(ranks):
    found = ranks(1).run(upstream_patterns, pattern="M-P|W-/P-/P-")[0]
    assert (found["main"], found["mtp"], found["depths"], found["layers"]) == ("M-P|W-", "P-", 2, 5)
    # one P in the layers and one in each of two heads
    assert {s: n for s, n in found["counts"].items() if n} == {"M": 1, "P": 3, "W": 1, "-": 4}
    assert {"P", "W"} <= set(found["symbols"])


def helpers() -> list[str]:
    """Calls what Megatron calls to compile the dataset helpers; names that the compiled module has."""
    from megatron.core.datasets import helpers_cpp
    from megatron.core.datasets.utils import compile_helpers

    if compile_helpers() is not None:
        raise ValueError("compile_helpers gave a result")
    return dir(helpers_cpp)


def test_the_dataset_helpers_are_there_and_not_compiled(ranks):
    names = ranks(1).run(helpers)[0]
    assert {"build_sample_idx_int32", "build_mapping", "build_blending_indices"} <= set(names)


def test_the_wheel_has_the_helpers_but_not_their_makefile():
    folder = UPSTREAM / "core" / "datasets"
    assert list(folder.glob("helpers_cpp*.so"))
    assert not (folder / "Makefile").exists(), "upstream's own compile_helpers would work: drop skip_helper_compilation"


def mtp_and_delta_net() -> dict[str, Any]:
    """One step of a model with a gated delta net and a multi-token-prediction head."""
    from megatron.core.utils import unwrap_model

    run = Run("G-M-*-/M-", "--mtp-num-layers 1 --use-distributed-optimizer")
    before = run.parameters()
    loss, norm = run.step()
    after = run.parameters()
    head = unwrap_model(run.model[0]).mtp.layers[0].mtp_model_layer
    inner = getattr(run.optimizer, "chained_optimizers", [run.optimizer])[0].optimizer
    return {
        "head": f"{type(head).__module__}.{type(head).__name__}",
        "layers": len(head.layers),
        "loss": loss,
        "norm": norm,
        "unmoved": [name for name in before if (before[name] == after[name]).all()],
        "optimizer": f"{type(inner).__module__}.{type(inner).__name__}",
        "steps": [group["step"] for group in inner.param_groups],
        "state": sorted({name for state in inner.state.values() for name in state}),
    }


@pytest.fixture(scope="module")
def step(ranks):
    return ranks(1).run(mtp_and_delta_net)[0]


def test_prediction_heads_are_built_from_our_stack(step):
    assert step["head"] == "megatron_hybrid.model.stack.HybridLayerStack"
    assert step["layers"] == 2


def test_delta_nets_and_heads_train(step):
    assert 0 < step["norm"] < 100 and 0 < step["loss"] < 100
    assert step["unmoved"] == []  # no parameter, in heads and delta net either


def test_the_distributed_optimizer_holds_our_adam(step):
    assert step["optimizer"] == "megatron_hybrid.patches.adam.FusedAdam"
    assert step["state"] == ["exp_avg", "exp_avg_sq"]
    assert set(step["steps"]) == {1}


def on_meta(pattern: str) -> dict[str, Any]:
    """A model built on the meta device: devices of its parameters, their number, and the number expected."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron

    from megatron_hybrid import costs
    from megatron_hybrid import pattern as language
    from megatron_hybrid.cli import arguments, flags
    from megatron_hybrid.model.build import model_config
    from megatron_hybrid.patches.meta import meta_device

    forget()
    argv = f"{SIZES} {MOE if 'E' in pattern else ''} {STEPS} --hybrid-layer-pattern {pattern}".split()
    args = arguments.parse(flags.resolve(argv).argv, "cpu")
    initialize_megatron()
    config = model_config(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with meta_device():
        model = config.get_builder_cls()(config).build_model(groups, pre_process=True, post_process=True)
    return {
        "devices": sorted({p.device.type for p in model.parameters()}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "expected": costs.model_parameters(language.parse(pattern), costs.sizes_of(args)).total,
        "afterwards": [torch.empty(1).device.type, torch.device(torch.cuda.current_device()).type],
    }


def test_a_model_on_the_meta_device_has_every_parameter_and_no_memory(ranks):
    found = ranks(1).run(on_meta, pattern="M-*-W-P-MEG-")[0]
    assert found["devices"] == ["meta"]
    assert found["parameters"] == found["expected"]
    assert found["afterwards"] == ["cpu", "cpu"]
