"""The Transformer Engine backend: built against Transformer Engine's own signatures, and stored as the torch backend.

Where Transformer Engine is installed, or its Python sources stand in the folder that TRANSFORMER_ENGINE_PATH
names (golden/record_te_signatures.py says how to get them), the models are built on the real classes; else on
a stand-in of the recorded ones. Neither computes anything here: this says nothing about results on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.golden.record_te_signatures import EXAMPLES, MODULES, state
from tests.support import te_stand_in
from tests.support.te_checkpoints import EVERY_SYMBOL, PREDICTS_TWO_TOKENS

GOLDEN = te_stand_in.GOLDEN
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What a process that builds the models of both backends reports (tests/support/te_checkpoints.py)."""
    folder = tmp_path_factory.mktemp("te")
    out = folder / "out.json"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.te_checkpoints",
            out,
            folder,
            os.environ.get("TRANSFORMER_ENGINE_PATH", ""),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    return json.loads(out.read_text())


def test_upstream_takes_the_stand_in_or_the_real_one(built):
    assert built["have_te"]
    assert built["real"] or built["version"] == GOLDEN["version"]


def test_the_record_is_that_of_the_real_package(built):
    if not built["real"]:
        pytest.skip("Transformer Engine is not installed; set TRANSFORMER_ENGINE_PATH to check the record")
    if built["version"] != GOLDEN["version"]:
        pytest.skip(f"recorded from {GOLDEN['version']}, installed is {built['version']}")
    assert built["record"] == GOLDEN


def test_the_record_holds_every_name_that_upstream_uses(built):
    def recorded(name):
        """The name, or the class or the missing part that it is a member of."""
        parts = name.split(".")
        return any(GOLDEN["names"].get(".".join(parts[:i])) not in (None, "module") for i in range(1, len(parts) + 1))

    used = [name for name in built["upstream_names"] if GOLDEN["names"].get(name) != "module"]
    assert [name for name in used if not recorded(name)] == []


# Classes of upstream's extensions/transformer_engine.py, and ours of it, in the layer of each symbol of EVERY_SYMBOL
FUSED, ROW = "TELayerNormColumnParallelLinear", "TERowParallelLinear"
PADDED = "AlignedNormColumnLinear"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("layers.0.mixer.in_proj", PADDED),
        ("layers.0.mixer.out_proj", ROW),
        ("layers.0.norm", "IdentityOp"),
        ("layers.1.mlp.linear_fc1", FUSED),
        ("layers.1.mlp.linear_fc2", ROW),
        ("layers.2.self_attention.linear_qkv", FUSED),
        ("layers.2.self_attention.core_attention", "TEDotProductAttention"),
        ("layers.4.self_attention.linear_qkv", FUSED),
        ("layers.4.self_attention.core_attention", "TorchCoreAttention"),
        ("layers.6.self_attention.in_proj", PADDED),
        ("layers.6.self_attention.out_proj", ROW),
        ("layers.9.pre_mlp_layernorm", "RMSNorm"),
        ("layers.9.mlp.experts.linear_fc1", "TEColumnParallelGroupedLinear"),
        ("layers.9.mlp.experts.linear_fc2", "TERowParallelGroupedLinear"),
        ("layers.9.mlp.shared_experts.linear_fc1", "TEColumnParallelLinear"),
        ("layers.10.self_attention.in_proj", PADDED),
        ("layers.10.self_attention.out_proj", ROW),
    ],
)
def test_layers_are_those_of_transformer_engine(built, module, expected):
    assert built["classes"]["decoder." + module] == expected


def test_input_projections_of_mixers_are_padded(built):
    """To 8 rows in bf16 and 16 in 8 bits; where nothing is added, the product itself adds up gradients."""
    found = built["padded"]
    assert len(found) == 2 * 4  # M, P, M, G
    for name, one in found.items():
        least = 16 if "8 bits" in name else 8
        assert one["padded"] == -(-one["rows"] // least) * least
        assert one["same"] and one["back"]
        assert one["fused"] == (one["padded"] == one["rows"])
    assert {one["fused"] for one in found.values()} == {True, False}


def test_the_real_linear_asks_for_its_weight_first(built):
    """Our linear decides there whether gradients are fused."""
    if not built["real"]:
        pytest.skip("Transformer Engine is not installed; set TRANSFORMER_ENGINE_PATH to check")
    assert built["fuses_later"]


@pytest.mark.parametrize("pattern", [EVERY_SYMBOL, PREDICTS_TWO_TOKENS])
def test_both_backends_store_the_same_tensors(built, pattern):
    def tensors(backend):
        return {k: v for k, v in built["stored"][pattern][backend].items() if v[0] == "ShardedTensor"}

    assert tensors("te") == tensors("torch")
    assert len(tensors("te")) > 20


@pytest.mark.parametrize("pattern", [EVERY_SYMBOL, PREDICTS_TWO_TOKENS])
def test_both_backends_store_the_same_extra_states(built, pattern):
    def objects(backend):
        return {k: v for k, v in built["stored"][pattern][backend].items() if v[0] == "ShardedObject"}

    assert all("_extra_state" in key for key in objects("te"))
    assert objects("te") == objects("torch")


@pytest.mark.parametrize("direction", ["torch to te", "te to torch"])
def test_checkpoints_cross_between_the_backends(built, direction):
    crossed = built["crossed"][direction]
    assert crossed["error"] is None
    assert crossed["differ"] == []
    assert crossed["tensors"] > 50


@pytest.mark.parametrize("name", MODULES)
def test_the_stand_in_stores_what_the_real_modules_store(name):
    examples = GOLDEN["modules"][name]["examples"]
    assert [e["arguments"] for e in examples] == EXAMPLES[name]
    for example in examples:
        assert state(te_stand_in.LAYERS[name], example["arguments"]) == example["state"]


@pytest.mark.parametrize("name", MODULES)
def test_the_stand_in_refuses_arguments_that_the_real_signature_lacks(name):
    layer, arguments = te_stand_in.LAYERS[name], EXAMPLES[name][0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'head_dim'"):
        layer(**arguments, head_dim=4)
    for parameter, _, required in GOLDEN["modules"][name]["signature"]:
        if required:
            with pytest.raises(TypeError, match=f"missing a required (keyword-only )?argument: '{parameter}'"):
                layer(**{k: v for k, v in arguments.items() if k != parameter})


def test_the_stand_in_hides_nothing_behind_placeholders():
    placeholder = te_stand_in._placeholder("transformer_engine.pytorch.ops.SwiGLU", "class")
    with pytest.raises(NotImplementedError, match="ops.SwiGLU is not part of the stand-in"):
        placeholder()
    assert not issubclass(placeholder, torch.nn.Module)
