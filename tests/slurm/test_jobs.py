"""Training jobs on a real SLURM: whatever happens to a job, its losses are to the bit those of a run without SLURM.

Each test submits examples/slurm/pretrain.sbatch on two nodes of one process each and disturbs it in the middle.
"""

import json
import shutil
import signal
import time

import pytest

from megatron_hybrid.run_folder.state import read_state
from tests.slurm.cluster import Job
from tests.slurm.runs import ITERATIONS, SAVE_INTERVAL, flags, iteration, records, steps, submit

PATIENCE_S = 300
"""For a job to begin, or to do what is left of it, on a busy machine; a quiet one needs a quarter of it."""
MIDDLE = SAVE_INTERVAL + 3
"""Where jobs are disturbed: a checkpoint is there, and the last step is not in it."""
HELD_UNTIL_S = 44
"""Of the only minute: SLURM's signal has come or is about to, and the rest is enough to save in, not to finish."""


@pytest.fixture
def run(tmp_path):
    """The folder of this test's run; large files do not outlive the test."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.fixture
def start(cluster, data, run):
    """``start(*sbatch options)``: a job that is in the middle of its training."""

    def started(*options: str) -> Job:
        job = submit(cluster, data, run, flags(data), *options)
        wait_for(job, run, MIDDLE)
        return job

    return started


def wait_for(job: Job, run, wanted: int) -> None:
    job.wait_until(lambda: iteration(run) >= wanted or job.ended(), PATIENCE_S, f"iteration {wanted} is done")
    assert iteration(run) >= wanted and not job.ended(), job.report()


def finish(job: Job, run) -> None:
    """Waits for the job to end as it should."""
    states = job.wait(PATIENCE_S)
    assert states == ["COMPLETED"], job.report()
    state = read_state(run)
    assert state is not None and (state.status, state.iteration) == ("finished", ITERATIONS), job.report()


def repeated(run) -> list[int]:
    """Iterations that were done more than once: those that a checkpoint did not have."""
    done = [r["iteration"] for r in records(run) if "loss" in r]
    return sorted({step for step in done if done.count(step) > 1})


def test_a_job_on_two_nodes_trains_as_torchrun_alone_does(start, run, undisturbed):
    job = start()
    nodes = [job.rank(rank).environment["SLURMD_NODENAME"] for rank in (0, 1)]
    finish(job, run)
    assert nodes == ["n1", "n2"]
    assert sorted(undisturbed) == list(range(1, ITERATIONS + 1))
    assert steps(run) == undisturbed
    assert job.facts()["Restarts"] == "0" and repeated(run) == []


def test_a_job_that_gets_sigterm_saves_and_comes_back(start, run, undisturbed):
    job = start()
    job.signal("TERM")
    finish(job, run)
    assert steps(run) == undisturbed
    assert job.facts()["Restarts"] == "1", job.report()
    assert repeated(run) == [], "it saved the last step before it went"


def test_a_job_at_its_time_limit_saves_and_comes_back(start, run, undisturbed):
    # SLURM looks at limits twice a minute: the signal comes 15 to 45 s before the end of the only minute
    began = time.time()
    job = start("--time=1", "--signal=B:USR1@15")
    ranks = [job.rank(0), job.rank(1)]
    for rank in ranks:  # held for some seconds, since a quiet machine has done all within the minute
        rank.signal(signal.SIGSTOP)
    time.sleep(max(0.0, HELD_UNTIL_S - (time.time() - began)))
    for rank in ranks:
        rank.signal(signal.SIGCONT)
    finish(job, run)
    assert steps(run) == undisturbed
    assert int(job.facts()["Restarts"]) >= 1, f"the run was done within the limit\n{job.report()}"
    assert repeated(run) == [], "it saved the last step before it went"


def test_a_job_that_is_requeued_by_hand_comes_back(start, run, cluster, undisturbed):
    job = start()
    cluster.run("scontrol", "requeue", job.number)
    finish(job, run)
    assert steps(run) == undisturbed
    assert job.facts()["Restarts"] == "1", job.report()


def test_a_job_that_is_preempted_saves_and_comes_back(start, run, cluster, undisturbed):
    job = start()
    cluster.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "sleep", "3")
    finish(job, run)
    assert steps(run) == undisturbed
    assert int(job.facts()["Restarts"]) >= 1, job.report()
    assert repeated(run) == [], "it saved the last step before it went"


@pytest.mark.parametrize("node", ["n2", "n1"])  # n1 is where the batch script and the rendezvous are
def test_a_job_outlives_a_node(node, start, run, cluster, undisturbed):
    job = start()
    cluster.kill_node(node)
    cluster.miss(node)
    cluster.start_node(node)
    finish(job, run)
    assert steps(run) == undisturbed
    assert int(job.facts()["Restarts"]) >= 1, job.report()
    assert min(repeated(run)) > SAVE_INTERVAL, "it began before the last checkpoint"


def test_a_job_outlives_a_rank(start, run, undisturbed):
    job = start()
    job.rank(1).signal(signal.SIGKILL)
    finish(job, run)
    assert steps(run) == undisturbed
    assert job.facts()["Restarts"] == "0", f"torchrun starts the ranks again inside the job\n{job.report()}"
    assert min(repeated(run)) > SAVE_INTERVAL, "it began before the last checkpoint"
    said = job.log()
    assert "SIGKILL" in said and "rank 1" in said and "n2" in said, job.report()


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size is 2, and a node runs 1 ranks"),
        ("--pipeline-model-parallel-size 4", "The job has 2 ranks, and tensor 1 x pipeline 4 x context 1 needs"),
    ],
)
def test_an_allocation_that_does_not_fit_is_refused(words, rule, cluster, data, run):
    job = submit(cluster, data, run, [*flags(data), *words.split()])
    assert job.wait(60) == ["FAILED"], job.report()
    facts = job.facts()
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0"), job.report()
    said = job.log()
    (paragraph,) = [part for part in said.split("\n\n") if "error: " in part]
    assert rule in paragraph, said
    assert "Traceback" not in said and said.count("error: ") == 1, said
    assert not (run / "state.json").exists() and not (run / "run.json").exists(), "training was started"


def test_a_job_goes_on_with_more_nodes(cluster, data, run, tmp_path):
    """Data parallelism of 1, then 2. Only the order of sums differs: 1e-5, as for all layouts (tests/model)."""
    first, last = 4, 8
    words = flags(data, iterations=last, dropout=0)  # the masks of two ranks are not those of one
    job = submit(cluster, data, run, [*words, "--exit-interval", str(first)], nodes=1)
    job.wait_until(lambda: job.ended() or iteration(run) >= first, PATIENCE_S, "the first job is done")
    job.wait(PATIENCE_S)
    assert iteration(run) == first, job.report()
    alone = tmp_path / "alone"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("logs"))
    for folder, nodes in ((alone, 1), (run, 2)):
        job = submit(cluster, data, folder, words, nodes=nodes)
        assert job.wait(PATIENCE_S) == ["COMPLETED"], job.report()
        assert json.loads((folder / "run.json").read_text())["args"]["data_parallel_size"] == nodes
    shutil.rmtree(alone / "iter_0000004")
    for step in range(first + 1, last + 1):
        assert steps(run)[step] == pytest.approx(steps(alone)[step], rel=1e-5)
