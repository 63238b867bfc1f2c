"""The micro-batch that a recipe takes on a GPU."""

import json
import sys
from argparse import Namespace

import pytest

from megatron_hybrid.cli import flags, micro_batch_size
from megatron_hybrid.cli.micro_batch_size import largest, needed
from megatron_hybrid.cli.processes import run_ranks
from megatron_hybrid.costs.hardware import MICRO_BATCHES, RESERVE, gpu
from megatron_hybrid.plan.figures import memory
from megatron_hybrid.plan.subject import read

RECIPE = "--recipe paper-1b-intra"
PLENTY = 1e15


@pytest.fixture(scope="module")
def args():
    """Megatron's arguments of the recipe, as it states its batch."""
    return read(RECIPE.split()).args


def chosen(line, bytes_, gpus=None, device="cuda"):
    return read(line.split(), gpus, device, memory=bytes_).layout


def bytes_for(args, size):
    """Bytes of a GPU on which a micro-batch just fits."""
    return 1.001 * needed(args, size) / (1 - RESERVE)


@pytest.mark.parametrize("size", MICRO_BATCHES)
def test_the_largest_that_fits(args, size):
    assert largest(args, bytes_for(args, size)).size == size
    assert largest(args, 0.9 * bytes_for(args, 2 * size)).size == size


@pytest.mark.parametrize("name", ["h100-80gb", "h200"])
def test_gpus_of_today(args, name):
    capacity = gpu(name).capacity
    size = largest(args, capacity).size
    assert size >= 2 and needed(args, size) <= (1 - RESERVE) * capacity
    assert size == MICRO_BATCHES[-1] or needed(args, 2 * size) > (1 - RESERVE) * capacity


def test_memory_is_that_of_the_plan(args):
    subject = read([*RECIPE.split(), "--micro-batch-size", "2"])
    assert needed(args, 2) == max(row["total"] for row in memory(subject))


def test_a_plan_takes_what_the_run_takes(args):
    assert chosen(RECIPE, gpu("h200").capacity).micro_batch == largest(args, gpu("h200").capacity).size > 1
    assert read(RECIPE.split()).layout.micro_batch == 1, "without a GPU's memory as the recipe has it"


def test_what_the_user_gives_stays():
    assert chosen(f"{RECIPE} --micro-batch-size 2", PLENTY).micro_batch == 2
    assert chosen(f"{RECIPE} --micro-batch-size=1", PLENTY).micro_batch == 1
    assert not flags.resolve([*RECIPE.split(), "--micro-batch-size=2"]).micro_batch_is_free
    assert not flags.resolve(["--hybrid-layer-pattern", "M-"]).micro_batch_is_free


def test_on_a_cpu_the_recipe_holds():
    assert chosen(RECIPE, PLENTY, device="cpu").micro_batch == 1
    command = flags.resolve(RECIPE.split())
    assert micro_batch_size.for_this_device(command, "cpu") == command


@pytest.mark.parametrize(
    ("batch", "gpus", "size"),
    [(256, 1, 8), (256, 64, 4), (6, 1, 2), (7, 7, 1), (24, 3, 8), (256, 256, 1)],
)
def test_it_divides_the_share_of_a_replica(batch, gpus, size):
    layout = chosen(f"{RECIPE} --global-batch-size {batch}", PLENTY, gpus)
    assert layout.micro_batch == size
    assert layout.micro_batches * size * gpus == batch


def test_a_pipeline_keeps_micro_batches_for_its_stages():
    line = f"{RECIPE} --balance-pipeline 2 --global-batch-size"
    assert chosen(f"{line} 64", PLENTY, 2).micro_batch == 8
    assert chosen(f"{line} 32", PLENTY, 2).micro_batch == 4, "8 micro-batches for 2 stages"
    assert chosen(f"{line} 4", PLENTY, 2).micro_batch == 1, "the recipe's own, though the stages have fewer"


def test_what_cannot_be_known_leaves_the_recipes(args):
    for changes, word in (
        ({"step_batch_size_schedule": "0:8 100:16"}, "changes during the run"),
        ({"defer_embedding_wgrad_compute": True}, "not known"),
        ({"vocab_size": None, "padded_vocab_size": None}, "--vocab-size"),
    ):
        choice = largest(Namespace(**{**vars(args), **changes}), PLENTY)
        assert choice.size == 1 and word in choice.note
    choice = largest(args, 2**30)
    assert choice.size == 1 and "does not fit 1.0 GiB" in choice.note


@pytest.fixture
def run(tmp_path, args):
    """A run's folder with a checkpoint and the micro-batch 2, and arguments of a run that goes on from it."""
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"args": {"micro_batch_size": 2}}))
    return Namespace(**{**vars(args), "save": str(tmp_path)})


def test_a_run_that_goes_on_keeps_its_own(run):
    kept = micro_batch_size._kept(run, gpu("h200").capacity)
    assert kept["size"] == 2 and "as in this run so far" in kept["note"]


def test_a_run_that_goes_on_elsewhere_chooses_anew(run, tmp_path):
    assert micro_batch_size._kept(run, bytes_for(run, 1)) is None, "2 do not fit"
    run.global_batch_size = 5
    assert micro_batch_size._kept(run, gpu("h200").capacity) is None, "2 do not divide 5"
    run.global_batch_size = 256
    (tmp_path / "iter_0000010").rmdir()
    assert micro_batch_size._kept(run, gpu("h200").capacity) is None, "nothing to go on from"


PROGRAM = """
import os, sys
from megatron_hybrid.cli import arguments, flags, micro_batch_size
mine = {memory}[int(os.environ["RANK"])]
micro_batch_size._memory = lambda device: mine
arguments.choose_device("cpu")
command = micro_batch_size.for_this_device(flags.resolve("{line}".split()), "cuda")
print("rank", os.environ["RANK"], command.argv[-2:], *command.notes)
"""


def test_ranks_of_unequal_gpus_take_the_same(tmp_path, args):
    program = tmp_path / "ranks.py"
    program.write_text(PROGRAM.format(memory=[bytes_for(args, 4), bytes_for(args, 2)], line=RECIPE))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert run_ranks([*torchrun, str(program)], 2, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    said = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("rank")]
    assert sorted(line[:6] for line in said) == ["rank 0", "rank 1"]
    assert all("['--micro-batch-size', '2'] micro-batch 2: the largest that fits" in line for line in said)
