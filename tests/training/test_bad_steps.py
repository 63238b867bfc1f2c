"""Steps that go wrong in real runs of the program: what stops, what is skipped, and which samples are named.

One sample has the token POISON, and the model gives what a fault would give where it reads it. Longer than other files,
because one clean run serves all its tests.
"""

import contextlib
import io
import json
import math
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest

from megatron_hybrid.data.indexed import IndexedWriter, dtype_for
from megatron_hybrid.run_folder.state import read_state
from megatron_hybrid.training.bad_steps import REPEATED, STOPPED
from tests.cli.test_command_line import PROGRAM, run
from tests.support.program import train
from tests.support.training import MOE, SIZES

POISON = 61
FLAGS = f"""{SIZES} {MOE} --lr 1e-3 --min-lr 1e-4 --lr-decay-style linear --lr-warmup-iters 2 --weight-decay 0.1
--clip-grad 1.0 --tokenizer-type NullTokenizer --split 100,0,0 --seed 7 --eval-iters 0 --eval-interval 100
--num-workers 0 --log-interval 1 --ckpt-format torch_dist --save-interval 100 --micro-batch-size 1"""
STEPS = 8
BATCH = 4
PATTERN = "M-P-WEM*-E"
SHARDED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
LAYOUTS = {
    "1": (1, PATTERN, SHARDED),
    "dp2": (2, PATTERN, f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"),
    "tp2": (2, PATTERN, f"{SHARDED} --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, PATTERN.replace("EM", "E|M"), f"{SHARDED} --pipeline-model-parallel-size 2"),
    "vpp2": (2, "M-P|-W|EM|*-E", f"{SHARDED} --pipeline-model-parallel-size 2"),
    "ep2": (2, PATTERN, "--expert-model-parallel-size 2"),
}
SKIP, STOP = "--on-bad-step skip", "--on-bad-step stop"


# What the ranks run ----------------------------------------------------------------------------------


def case(argv: list[str], fault: str = "", times: int = 10**6) -> dict[str, Any]:
    """Trains; the end of it, and the state that it leaves on this rank.

    Args:
        fault: Of a micro-batch with POISON: ``nan`` hidden states, a ``gradient`` that is not finite, or a loss that
            jumps (``spike``, on one stage).
        times: How often there is one.
    """
    import torch
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    from megatron_hybrid.training.provider import datasets

    upstreams, held, left = training.train, {}, [times]

    def spoiled(forward: Any, model: list, optimizer: Any, *more: Any, **named: Any) -> Any:
        held.update(model=model, optimizer=optimizer)
        for chunk in unwrap_model(model) if fault else ():
            spoil(chunk, fault, left)
        return upstreams(forward, model, optimizer, *more, **named)

    training.train = spoiled
    said, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(said):
            train(argv)
    except SystemExit as end:
        code = end.code
    finally:
        training.train = upstreams
    assert held, said.getvalue()
    state: dict[str, Any] = {}
    for i, chunk in enumerate(held["model"]):
        state |= {f"{i}.{name}": t for name, t in chunk.state_dict().items() if torch.is_tensor(t)}
    for i, part in enumerate(held["optimizer"].chained_optimizers):
        for j, p in enumerate(p for group in part.optimizer.param_groups for p in group["params"]):
            state |= {f"optimizer.{i}.{j}.{name}": t for name, t in {"main": p, **part.optimizer.state[p]}.items()}
    samples = number(argv, "--train-iters") * number(argv, "--global-batch-size")
    drawn = datasets([samples, 0, 0])[0]
    return {
        "code": code,
        "said": said.getvalue(),
        "state": {name: numpy.array(torch.as_tensor(t).detach().float()) for name, t in state.items()},
        "samples": None if drawn is None else [drawn[i]["tokens"].tolist() for i in range(len(drawn))],
    }


def number(argv: list[str], flag: str) -> int:
    return int(argv[argv.index(flag) + 1])


def spoil(chunk: Any, fault: str, left: list[int]) -> None:
    """Makes a chunk of the model faulty where it reads POISON."""
    bad = [False]

    def embedded(_module: Any, args: Any, named: dict, out: Any) -> Any:
        bad[0] = bool((named["input_ids"] == POISON).any()) and left[0] > 0
        left[0] -= bad[0]
        if bad[0] and fault == "gradient":
            out.register_hook(lambda gradient: gradient * math.inf)
        return out * math.nan if bad[0] and fault == "nan" else out

    def projected(_module: Any, args: Any, out: Any) -> Any:
        return (out[0] * 100, *out[1:]) if bad[0] and fault == "spike" else out

    if getattr(chunk, "embedding", None):
        chunk.embedding.register_forward_hook(embedded, with_kwargs=True)
    if getattr(chunk, "output_layer", None):
        chunk.output_layer.register_forward_hook(projected)


# What it runs on -------------------------------------------------------------------------------------


class Data(NamedTuple):
    flags: str
    documents: dict[str, list[list[int]]]
    """Of each data set by its path."""


def corpus(folder: Path, name: str, tokens: int, poisoned: Container[int] = (), seed: int = 0) -> Data:
    """Documents of random tokens; those at ``poisoned`` have POISON in them."""
    generator, found = numpy.random.default_rng(seed), []
    with IndexedWriter(folder, name, dtype_for(64)) as writer:
        while sum(map(len, found)) < tokens:
            document = generator.integers(0, 60, generator.integers(5, 60)).astype(numpy.uint16)
            if len(found) in poisoned:
                document[len(document) // 2] = POISON
            writer.add(document, numpy.array([len(document)]))
            found.append(document.tolist())
        writer.finish()
    return Data(f"--data-path {folder / name} --data-cache-path {folder}/cache", {str(folder / name): found})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    return corpus(tmp_path_factory.mktemp("data"), "text", STEPS * BATCH * 32 + 100, poisoned={5})


class Ended(NamedTuple):
    folder: Path
    ranks: list[dict[str, Any]]

    @property
    def codes(self) -> set[int]:
        return {rank["code"] for rank in self.ranks}

    @property
    def bad(self) -> list[dict[str, Any]]:
        path = self.folder / "bad_batches.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {r["iteration"]: r for r in records if "loss" in r}


@pytest.fixture(scope="module")
def trained(ranks, data, tmp_path_factory):
    """``trained(layout, flags, fault, times)``: a run on the data, in a folder of its own or in ``save``."""

    def of(layout, flags="", fault="", times=10**6, save=None, batch=BATCH, steps=STEPS, flags_of_data=data.flags):
        size, pattern, parallel = LAYOUTS[layout]
        where = save or tmp_path_factory.mktemp("run")
        line = f"""{FLAGS} {flags_of_data} --global-batch-size {batch} --train-iters {steps} {parallel} {flags}
            --hybrid-layer-pattern {pattern} --save {where}"""
        argv = line.split()
        return Ended(where, ranks(size).run(case, argv=argv, fault=fault, times=times))

    return of


@pytest.fixture(scope="module")
def clean(trained) -> Ended:
    """Nothing goes wrong."""
    return trained("1")


@pytest.fixture(scope="module")
def place(clean) -> int:
    """Index of the sample with POISON, behind the first two steps and before the last two."""
    (index,) = [i for i, tokens in enumerate(clean.ranks[0]["samples"][: STEPS * BATCH]) if POISON in tokens]
    assert 2 * BATCH <= index < (STEPS - 2) * BATCH
    return index


def names_the_sample(record: dict[str, Any], index: int, data: Data, tokens: list[int], ranks: int) -> None:
    """Checks what is written of one bad loss against the data set's own tokens."""
    assert record["iteration"] == index // BATCH + 1
    assert record["samples"] == [index]
    assert (record["micro_batch"], record["data_parallel_rank"]) == divmod(index % BATCH, ranks)
    (source,) = record["sources"]
    documents = data.documents[source["data_set"]]
    assert any(POISON in documents[i] for i in source["documents"])
    text = [token for i in source["documents"] for token in documents[i]]
    assert any(text[at : at + len(tokens)] == tokens for at in range(len(text)))


def same(one: Ended, other: Ended) -> bool:
    pairs = list(zip(one.ranks, other.ranks, strict=True))
    assert all(a["state"].keys() == b["state"].keys() and len(a["state"]) > 20 for a, b in pairs)
    return all(numpy.array_equal(a["state"][name], b["state"][name]) for a, b in pairs for name in a["state"])


# Skip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_leaves_what_a_step_that_was_left_out_leaves(trained, place, data, clean, layout):
    """Upstream's --iterations-to-skip draws the batch and does nothing with it: weights, moments, bias, schedule."""
    iteration = place // BATCH + 1
    skipped = trained(layout, SKIP, "nan")
    left_out = trained(layout, f"--iterations-to-skip {iteration}")
    assert skipped.codes == left_out.codes == {0}
    assert same(skipped, left_out)
    assert all(numpy.isfinite(t).all() for rank in skipped.ranks for t in rank["state"].values())
    assert [i for i, step in skipped.steps.items() if step["skipped"]] == [iteration]
    assert list(skipped.steps) == list(range(1, STEPS + 1))
    figures = ("loss", "grad_norm", "learning_rate", "samples", "skipped")
    for i, step in left_out.steps.items():
        assert [step[name] for name in figures] == [skipped.steps[i][name] for name in figures]
    state = read_state(skipped.folder)
    assert (state.status, state.iteration) == ("finished", STEPS)
    (record,) = skipped.bad
    assert (record["outcome"], record["found"], record["value"]) == ("skipped", "found NaN in the loss", "nan")
    names_the_sample(record, place, data, clean.ranks[0]["samples"][place], 2 if layout in ("dp2", "ep2") else 1)


def test_the_step_would_have_changed_the_run(trained, clean, place):
    assert clean.bad == [] and clean.codes == {0}
    assert not same(clean, trained("1", f"--iterations-to-skip {place // BATCH + 1}"))
    assert same(clean, trained("1", SKIP))  # it costs nothing where nothing is wrong


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_a_gradient_alone_names_the_whole_step(trained, place, layout):
    first = place // BATCH * BATCH
    skipped, stopped = trained(layout, SKIP, "gradient"), trained(layout, STOP, "gradient")
    assert skipped.codes == {0} and stopped.codes == {REPEATED}
    assert all(numpy.isfinite(t).all() for rank in skipped.ranks for t in rank["state"].values())
    for ended, outcome in ((skipped, "skipped"), (stopped, "stopped")):
        (record,) = ended.bad
        assert "in the gradient" in record["found"] and record["outcome"] == outcome
        assert record["micro_batch"] is record["rank"] is None
        assert record["samples"] == list(range(first, first + BATCH)) and None not in record["sources"]
    assert math.isfinite(skipped.steps[place // BATCH + 1]["loss"])


@pytest.mark.parametrize("layout", ["1", "dp2"])
def test_no_more_steps_in_a_row_are_skipped_than_allowed(trained, place, layout):
    ended = trained(layout, f"{SKIP} --max-skipped-steps 0", "nan")
    assert ended.codes == {STOPPED}
    assert [record["outcome"] for record in ended.bad] == ["stopped"]
    assert list(ended.steps) == list(range(1, place // BATCH + 1))
    assert "0 steps in a row have been skipped (--max-skipped-steps)" in ended.ranks[0]["said"]


# Stop ------------------------------------------------------------------------------------------------


def failed(ended: Ended, iteration: int) -> None:
    """It says so, and saved nothing."""
    state = read_state(ended.folder)
    assert (state.status, state.reason, state.iteration) == ("failed", "result validation", iteration - 1)
    assert list(ended.steps) == list(range(1, iteration))
    assert not list(ended.folder.glob("iter_*")) and not list(ended.folder.glob("latest*"))
    assert f"error: iteration {iteration} is rejected and the run stops" in ended.ranks[0]["said"]
    assert not any("error: " in rank["said"] for rank in ended.ranks[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fault_that_repeats_stops_all_ranks(trained, place, data, clean, layout):
    ended = trained(layout, fault="nan")  # --on-bad-step stop is the default
    assert ended.codes == {REPEATED}
    failed(ended, place // BATCH + 1)
    (record,) = ended.bad
    assert record["outcome"] == "stopped"
    names_the_sample(record, place, data, clean.ranks[0]["samples"][place], 2 if layout in ("dp2", "ep2") else 1)


@pytest.mark.parametrize("layout", ["1", "dp2", "pp2"])
def test_a_fault_that_does_not_repeat_is_told_apart(trained, place, layout):
    ended = trained(layout, STOP, "nan", times=1)
    assert ended.codes == {STOPPED}
    failed(ended, place // BATCH + 1)
    assert [record["samples"] for record in ended.bad] == [[place]]
    assert "a second try of the step gave something else" in ended.ranks[0]["said"]


def test_without_the_rerun_machine_the_step_stops_at_once(trained, place):
    ended = trained("dp2", f"{STOP} --rerun-mode disabled", "nan")
    assert ended.codes == {STOPPED}
    failed(ended, place // BATCH + 1)
    assert [record["samples"] for record in ended.bad] == [[place]]


def test_a_run_goes_on_past_the_bad_step(trained, place, tmp_path):
    """From the checkpoint before it; and a process that starts with the bad step stops, without a second try."""
    before = place // BATCH
    again = f"--save-interval {before} --load {tmp_path} --load-unverified"
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    ended = trained("1", again, "nan", save=tmp_path)
    assert ended.codes == {REPEATED} and tracker.read_text() == str(before)
    first = trained("1", again, "nan", save=tmp_path)
    assert first.codes == {STOPPED} and "no second try in the first step" in first.ranks[0]["said"]
    assert [(r["iteration"], r["samples"]) for r in first.bad] == 2 * [(before + 1, [place])]
    assert tracker.read_text() == str(before)
    for answer in (SKIP, f"--iterations-to-skip {before + 1}"):
        gone_on = trained("1", f"{again} {answer}", "nan", save=tmp_path)
        assert gone_on.codes == {0}
        assert same(gone_on, trained("1", f"--iterations-to-skip {before + 1}"))
        tracker.write_text(str(before))


# Spikes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Data:
    """Samples enough for a spike behind the 100 micro-batches that say what is none: 10 steps of 16."""
    return corpus(tmp_path_factory.mktemp("long"), "text", 160 * 32 + 100, poisoned={37}, seed=1)


@pytest.fixture(scope="module")
def spiked(trained, long):
    def of(flags: str, times: int = 10**6) -> Ended:
        flags += " --check-for-spiky-loss --spike-threshold 3 --moe-router-bias-update-rate 0.1"
        return trained("1", flags, "spike", times, batch=16, steps=10, flags_of_data=long.flags)

    return of


def test_a_spike_is_skipped(spiked):
    ended = spiked(SKIP)
    assert ended.codes == {0}
    (record,) = ended.bad
    iteration, (index,) = record["iteration"], record["samples"]
    assert POISON in ended.ranks[0]["samples"][index] and iteration == index // 16 + 1 > 7
    assert [i for i, step in ended.steps.items() if step["skipped"]] == [iteration]
    largest = max(step["loss"] for i, step in ended.steps.items() if i != iteration)
    assert record["found"] == "found a spike in the loss" and record["value"] > 3 * largest
    # the mean over a micro-batch's tokens: with 15 others of common losses it makes the step's
    others = (16 * ended.steps[iteration]["loss"] - record["value"]) / 15
    assert others == pytest.approx(largest, rel=0.2)


def test_a_spike_stops_the_run_with_a_second_try(spiked):
    """The experts' bias moves far in a step: with that of the first try the second one would give another loss."""
    repeats, differs = spiked(STOP), spiked(STOP, times=1)
    assert (repeats.codes, differs.codes) == ({REPEATED}, {STOPPED})
    for ended in (repeats, differs):
        (record,) = ended.bad
        failed(ended, record["iteration"])
        assert POISON in ended.ranks[0]["samples"][record["samples"][0]]


def test_no_spike_is_looked_for_unless_asked(trained, long):
    ended = trained("1", STOP, "spike", batch=16, steps=10, flags_of_data=long.flags)
    assert ended.codes == {0} and ended.bad == []


# Blends, and the launcher ----------------------------------------------------------------------------


def test_the_data_set_of_a_blend_is_named(trained, tmp_path):
    web = corpus(tmp_path, "web", 1200, seed=2)
    code = corpus(tmp_path, "code", 600, poisoned=range(0, 100, 5), seed=3)
    both = Data("", web.documents | code.documents)
    flags = f"--data-path 2 {tmp_path}/web 1 {tmp_path}/code --data-cache-path {tmp_path}/cache"
    ended = trained("dp2", SKIP, "nan", flags_of_data=flags)
    assert ended.codes == {0} and ended.bad
    for record in ended.bad:
        (index,) = record["samples"]
        assert record["sources"][0]["data_set"] == f"{tmp_path}/code"
        names_the_sample(record, index, both, ended.ranks[0]["samples"][index], 2)


RUINED = "--lr 1e25 --min-lr 1e25 --lr-decay-style constant --lr-warmup-iters 0"
"""A learning rate that ruins the weights in the first step."""


def test_ruined_weights_are_not_skipped_for_ever(trained):
    ended = trained("dp2", f"{RUINED} {SKIP} --max-skipped-steps 2 --save-interval 1")
    assert ended.codes == {STOPPED}
    outcomes = [(i, "stopped" if i == 4 else "skipped", 4 * (i - 1) + s) for i in (2, 3, 4) for s in range(BATCH)]
    assert sorted((r["iteration"], r["outcome"], *r["samples"]) for r in ended.bad) == outcomes
    assert {r["data_parallel_rank"] for r in ended.bad} == {0, 1}
    assert "2 steps in a row have been skipped" in ended.ranks[0]["said"]
    assert (ended.folder / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_the_launcher_does_not_start_a_bad_run_again(tmp_path):
    line = f"""local --nproc 2 --max-restarts 3 -- --recipe demo --expert-model-parallel-size 1 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 100 --train-iters 8 --seq-length 64 --micro-batch-size 1
    --global-batch-size 4 --eval-iters 0 --device cpu {RUINED} --lr-wsd-decay-iters 0 --data-cache-path {tmp_path}/cache
    --save {tmp_path}"""
    done = run(str(Path(PROGRAM).parent / "tools" / "launch.py"), *line.split())
    assert done.returncode == REPEATED, done.stdout[-3000:] + done.stderr[-3000:]
    state = read_state(tmp_path)
    assert (state.status, state.reason, state.iteration) == ("failed", "result validation", 1)
    records = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert sorted((r["iteration"], *r["samples"]) for r in records) == [(2, s) for s in range(4, 8)]
    assert (tmp_path / "metrics.jsonl").read_text().count('"resume"') == 1  # one start
    assert not list(tmp_path.glob("iter_*"))
