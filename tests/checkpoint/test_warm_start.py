"""P layers that start from the weights of trained stock layers."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.checkpoint import warm_start, warm_start_sources
from megatron_hybrid.checkpoint.warm_start_sources import Source
from megatron_hybrid.layers.intra.design import design
from tests.model.test_layouts import RTOL, SP, TP2
from tests.support.single import build
from tests.support.training import MOE, SIZES, STEPS, continued, folder, forget, trained
from tools import warm_start as tool

# The branches as wide as the stock layers of the tests' sizes
WIDE = "--intra-qk-dim 32 --intra-ssm-dim 64"
NORM = "--intra-norm group --intra-norm-groups 2"
"""As many groups as the stock Mamba layer's norm has."""
STOCK = Namespace(
    hidden_size=32,
    num_attention_heads=4,
    group_query_attention=True,
    num_query_groups=2,
    kv_channels=8,
    mamba_head_dim=8,
    mamba_num_groups=2,
    mamba_state_dim=8,
)
"""What the tests' sizes store in a checkpoint."""


def intra(**axes: Any) -> Any:
    """The design of a P layer of the stock layers' widths."""
    widths = {"intra_num_attention_heads": 4, "intra_num_query_groups": 2, "intra_qk_dim": 32, "intra_ssm_dim": 64}
    return design(Namespace(**{**vars(STOCK), **widths, **{f"intra_{axis}": value for axis, value in axes.items()}}))


# One layer -------------------------------------------------------------------------------------------


def outputs(flags: str, sources: dict[str, int], silent: str, stock: int) -> tuple[Any, Any]:
    """A stock layer and a P layer that starts from it, on one input.

    Args:
        flags: Of the P layer.
        sources: Its branches to stock layers: 0 is M, 1 is ``*``.
        silent: Branch whose columns of the output projection are set to 0.
        stock: The layer to compare with.

    Returns:
        Outputs [32, 2, h] of the stock layer and of the P layer, with the residual.
    """
    from megatron_hybrid.checkpoint import weights

    train = "--micro-batch-size 1 --train-iters 1 --lr 1e-3"
    model, args = build(f"{SIZES} {train} {flags} --hybrid-layer-pattern=M*P".split())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():  # norms too: no two alike
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    stored = {piece.key: piece.data.detach() for piece in weights.stored_tensors(model)}
    found = design(args)
    mixers = {}
    for name, number in sources.items():
        prefix = f"decoder.layers.{number}."
        layer = {key.removeprefix(prefix): t for key, t in stored.items() if key.startswith(prefix)}
        made = warm_start.attention_mixer(layer, 4, 2) if number else warm_start.mamba_mixer(layer)
        mixers[found.names.index(name)] = made
    made_of = warm_start.intra_layer(mixers, found)
    weights.fill(model, {f"decoder.layers.2.{key}": tensor for key, tensor in made_of.items()})
    assert {f"decoder.layers.2.{key}" for key in made_of} <= set(stored)
    mixer = model.decoder.layers[2].self_attention
    widths = list(mixer.out_parts.values())
    mixer.out_proj.weight.data.split(widths, 1)[list(mixer.out_parts).index(silent)].zero_()
    x = torch.randn(32, 2, args.hidden_size, generator=generator)
    ys = [
        layer(hidden_states=x, attention_mask=None) for layer in (model.decoder.layers[stock], model.decoder.layers[2])
    ]
    first, second = (y[0] if isinstance(y, tuple) else y for y in ys)
    assert (first - x).abs().mean() > 0.1  # the layers do something
    return first.detach().numpy(), second.detach().numpy()


SHARED = "--intra-preset falcon-h1 --intra-value shared --intra-qk-dim 32 --intra-ssm-dim 32"
CASES = {
    "attention": (f"--intra-preset falcon-h1 {WIDE}", {"attention": 1}, "mamba", 1),
    "attention of both": (f"--intra-preset falcon-h1 {WIDE}", {"attention": 1, "mamba": 0}, "mamba", 1),
    "mamba": (f"--intra-preset paper {NORM} {WIDE}", {"mamba": 0}, "attention", 0),
    # the input norm is the attention layer's: the ratio stands in the projection
    "mamba of both": (f"--intra-preset paper {NORM} {WIDE}", {"attention": 1, "mamba": 0}, "attention", 0),
    "attention, value shared": (SHARED, {"attention": 1}, "mamba", 1),
    "second attention": (
        f"--intra-branches attention,attention --intra-preset falcon-h1 {WIDE}",
        {"attention1": 1, "attention2": 1},
        "attention1",
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_branch_computes_what_its_stock_layer_does(ranks, case):
    flags, sources, silent, stock = CASES[case]
    expected, found = ranks(1).run(outputs, flags=flags, sources=sources, silent=silent, stock=stock)[0]
    # the same function; products of other shapes sum in another order, and the ratio of norms rounds once more
    assert abs(found - expected).max() < 2e-5 * abs(expected).max()


def mixer(kind: str, **changed: Any) -> warm_start.Mixer:
    """A mixer of the stock sizes with random weights."""
    rows = {"z": 64, "x": 64, "B": 16, "C": 16, "dt": 8} if kind == "mamba" else {"q": 32, "k": 16, "v": 16}
    values: dict[str, Any] = {
        "input_norm": torch.rand(32) + 0.5,
        "inputs": {name: torch.randn(n, 32) for name, n in rows.items()},
        "core": {"A_log": torch.randn(8)} if kind == "mamba" else {},
        "output": torch.randn(32, 64 if kind == "mamba" else 32),
        "output_norm": torch.rand(64) if kind == "mamba" else None,
    }
    return warm_start.Mixer(**{**values, **changed})


def test_an_input_norm_with_zeros_hides_nothing_from_the_other_branch():
    weight = torch.rand(32) + 0.5
    weight[3] = 0
    first, second = mixer("attention", input_norm=weight), mixer("mamba")
    found = warm_start.intra_layer({0: first, 1: second}, intra(preset="paper"))
    norm = found["self_attention.in_proj.layer_norm_weight"]
    for part, source in (("q", first), ("dt", second)):
        seen = found[f"self_attention.in_proj.weight.{part}"] * norm
        torch.testing.assert_close(seen, source.inputs[part] * source.input_norm)


def test_the_weight_of_a_norm_that_the_design_lacks_goes_into_the_output_projection():
    source = mixer("mamba")
    found = warm_start.intra_layer({1: source}, intra(preset="falcon-h1"))
    assert not any("_norm.weight" in key and "fusion" in key for key in found)
    y = torch.randn(5, 64)
    expected = (y * source.output_norm) @ source.output.T
    torch.testing.assert_close(y @ found["self_attention.out_proj.weight.mamba"].T, expected)


@pytest.mark.parametrize(
    ("axes", "sources", "words"),
    [
        ({"qk_dim": 16}, {0: "*"}, ["--intra-qk-dim is 16 and the layer * has 32", "Set --intra-qk-dim 32."]),
        ({"value_dim": 64, "num_query_groups": 4}, {0: "W"}, ["--intra-value-dim 32", "--intra-num-query-groups 2"]),
        ({"ssm_dim": 32}, {1: "M"}, ["--intra-ssm-dim is 32 and the layer M has 64", "Set --intra-ssm-dim 64."]),
        ({"ssm_head_dim": 16}, {1: "M"}, ["--intra-ssm-head-dim is 16 and the layer M has 8"]),
        ({}, {0: "M"}, ["attention branch", "* or W", "a layer M"]),
        ({}, {1: "-"}, ["mamba branch", "a layer -"]),
        ({"output": "joint", "fusion": "diff", "value_dim": 32, "ssm_dim": 32}, {0: "*", 1: "N"}, ["one matrix"]),
        ({"value": "shared", "ssm_dim": 32}, {0: "*", 1: "N"}, ["--intra-value shared", "Initialise one"]),
    ],
)
def test_sources_that_do_not_fit_are_refused_with_the_remedy(axes, sources, words):
    narrow = Namespace(**{**vars(STOCK), "mamba_num_heads": 4})  # N: a Mamba layer as wide as an attention layer
    args = {"M": STOCK, "N": narrow}
    with pytest.raises(ValueError) as error:
        given = {branch: ("M" if s == "N" else s, args.get(s, STOCK)) for branch, s in sources.items()}
        warm_start.check_branches(intra(**axes), given)
    for word in words:
        assert word in str(error.value)


# The program -----------------------------------------------------------------------------------------


def made(argv: list[str]) -> str:
    """Runs the program in this process; its error, or nothing."""
    forget()
    kept = sys.argv
    try:
        tool.main(argv)
    except ValueError as error:
        return str(error)
    finally:
        sys.argv = kept
    return ""


def differing(old: str, new: str, names: dict[str, str]) -> list[str]:
    """Which tensors of a new checkpoint are not bit for bit those of an old one.

    Args:
        old: Folder of the old run.
        new: Folder of the new one.
        names: Prefixes of the new names to those of the old ones.
    """
    from megatron_hybrid.checkpoint.weights import open_checkpoint, read_tensors, tensor_shapes

    before, after = (open_checkpoint(where)[0] for where in (old, new))
    assert not any(key.startswith("optimizer") for key in tensor_shapes(after))
    pairs = {
        key: old_prefix + key.removeprefix(prefix)
        for key in tensor_shapes(after)
        for prefix, old_prefix in names.items()
        if key.startswith(prefix)
    }
    olds, news = read_tensors(before, pairs.values()), read_tensors(after, pairs)
    assert len(pairs) > 10
    return [key for key, was in pairs.items() if not torch.equal(news[key], olds[was])]


def test_an_inter_layer_hybrid_goes_on_as_an_intra_layer_one_in_any_layout(ranks, tmp_path):
    old, new = folder(tmp_path / "old"), str(tmp_path / "new")
    ranks(2).run(trained, pattern="M-*E", flags=f"{TP2} {SP}", save=old, before=1, after=0)
    # a checkpoint of two ranks, a run of two stages; data that is not there is not asked for
    run = f"{SIZES} {MOE} {STEPS.replace('--mock-data', '--data-path nowhere')} {WIDE} {NORM}"
    run += " --pipeline-model-parallel-size 2 --hybrid-layer-pattern M-|PE"
    layers = ["--layers", "3:attention=3,mamba=1"]
    assert ranks(1).run(made, argv=["--from", old, *layers, "--save", new, "--", *run.split()])[0] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    branch = "decoder.layers.2.self_attention."
    same = {f"decoder.layers.{i}.": f"decoder.layers.{i}." for i in (0, 1, 3)}
    same |= {"embedding.": "embedding.", "decoder.final_norm.": "decoder.final_norm."}
    same |= {f"{branch}mamba.": "decoder.layers.0.mixer.", f"{branch}fusion.mamba_": "decoder.layers.0.mixer."}
    assert ranks(1).run(differing, old=old, new=new, names=same)[0] == []
    flags = f"{WIDE} {NORM}"
    alone = ranks(1).run(continued, pattern="M-PE", flags=flags, load=new, steps=1)[0]["steps"]
    split = ranks(2).run(continued, pattern="M-PE", flags=f"{flags} {TP2} {SP}", load=new, steps=1)
    for rank in split:
        assert rank["steps"][0] == pytest.approx(alone[0], rel=RTOL)

    # What does not fit leaves nothing behind
    argv = ["--from", old, "--layers", "3:attention=3", "--save", f"{new}2", "--", *run.split(), "--intra-qk-dim", "16"]
    assert "Set --intra-qk-dim 32." in ranks(1).run(made, argv=argv)[0]
    argv[-2:] = ["--ffn-hidden-size", "64"]
    error = ranks(1).run(made, argv=argv)[0]
    assert "decoder.layers.1.mlp.linear_fc1.weight is (96, 32) in the checkpoint and (128, 32)" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    command = [
        sys.executable,
        "tools/warm_start.py",
        "--from",
        "old",
        "--save",
        str(tmp_path),
        "--",
        "--recipe",
        "demo",
    ]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert (
        run.stderr.startswith(f"error: --save {tmp_path} exists: give a new folder") and "Traceback" not in run.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "3:attention=3,mamba=1",
            {3: {"attention": Source(0, 3), "mamba": Source(0, 1)}},
        ),
        ("12:mamba2=2.7", {12: {"mamba2": Source(1, 7)}}),
        ("5=7", {5: Source(0, 7)}),
    ],
)
def test_layers_as_written(text, found):
    assert warm_start_sources.parse_layers([text]) == found


@pytest.mark.parametrize("texts", [["3"], ["3:gdn=1"], ["3:mamba=1,mamba=2"], ["3=1", "3=2"], ["a=1"], ["3:=1"]])
def test_layers_that_cannot_be_read_are_refused(texts):
    with pytest.raises(ValueError, match=f"--layers {texts[-1]}: "):
        warm_start_sources.parse_layers(texts)


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["9=1"], "layers 1 to 4"),
        (["1=2"], "layer 1 is M and the old one is -"),
        (["1:mamba=1"], "only P layers have branches"),
        (["3:mamba2=1"], "the branches are attention and mamba"),
        (["3:mamba=9"], "has layers 1 to 4"),
        (["3:mamba=2.1"], "--from names 1 folders"),
    ],
)
def test_layers_that_are_not_there_are_refused(texts, word):
    old = warm_start_sources.Old("old", STOCK, {}, "M-*-", ("", 0))
    with pytest.raises(ValueError, match=word):
        warm_start_sources.complete(warm_start_sources.parse_layers(texts), "M-P-", [old], intra())


def test_two_lengths_of_one_padded_vocabulary_are_taken_for_it_and_others_are_not():
    def check(old: int, new: int) -> None:
        args = Namespace(make_vocab_size_divisible_by=16, tensor_model_parallel_size=2)
        piece = Namespace(key="embedding", global_shape=(new, 8), allow_shape_mismatch=True)
        warm_start_sources.check_shapes({"embedding": torch.empty(old, 8)}, [piece], args, args)

    check(64, 96 - 16)
    check(96 - 16, 64)
    for old, new in ((64, 96), (96, 64)):
        with pytest.raises(ValueError, match=rf"\({old}, 8\) in the checkpoint and \({new}, 8\)"):
            check(old, new)
