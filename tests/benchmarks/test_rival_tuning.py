"""Choices of Triton's autotuner, given from one process to the next."""

import json
import sys
import types

import pytest
import triton
from triton.runtime.autotuner import Autotuner, Heuristics

from megatron_hybrid.benchmarks import rival_tuning

MODULE = "mamba_ssm.ops.triton.scan_of_a_test"
CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps, num_stages=2, pre_hook=print)
    for block in (32, 64)
    for warps in (4, 8)
]
KEY = (128, True, "torch.bfloat16")


def module():
    """A module of mamba_ssm with a kernel under two decorators, and something that is no kernel."""

    def kernel():
        pass

    tuner = Autotuner.__new__(Autotuner)  # its own making needs a kernel that Triton compiles
    tuner.fn, tuner.configs, tuner.cache = kernel, CONFIGS, {}
    made = types.ModuleType(MODULE)
    outer = Heuristics.__new__(Heuristics)
    outer.fn = tuner
    made._kernel, made.other = outer, 3
    return made, tuner


@pytest.fixture
def tuner(monkeypatch):
    made, found = module()
    monkeypatch.setitem(sys.modules, MODULE, made)
    return found


def test_choices_come_back_as_the_configurations_themselves(tuner, tmp_path):
    tuner.cache[KEY] = CONFIGS[2]
    assert rival_tuning.save(tmp_path / "chosen") == 1
    tuner.cache.clear()
    assert rival_tuning.load(tmp_path / "chosen") == 1
    assert tuner.cache == {KEY: CONFIGS[2]}
    assert tuner.cache[KEY] is CONFIGS[2], "with its pre_hook, which no file holds"


def test_a_configuration_that_is_gone_is_left_out(tuner, tmp_path):
    name = f"{MODULE}._kernel"
    (tmp_path / "chosen").write_text(json.dumps({name: {repr(KEY): "[('BLOCK', 16)] warps 4 stages 2"}}))
    assert rival_tuning.load(tmp_path / "chosen") == 0 and not tuner.cache


def test_without_the_package_there_is_nothing(tmp_path):
    assert rival_tuning.save(tmp_path / "chosen") == 0
    assert rival_tuning.load(tmp_path / "chosen") == 0
