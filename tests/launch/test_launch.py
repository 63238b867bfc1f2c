"""The launcher's logic: SLURM's variables, flags against the allocation, what follows an end, and the two screens."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hybrid.launch import allocation, environment, events, preflight, requeue, summary
from megatron_hybrid.launch.allocation import Allocation
from megatron_hybrid.launch.events import Event
from megatron_hybrid.run_folder.progress import Progress
from megatron_hybrid.run_folder.state import State, write_state

JOB = {"SLURM_JOB_ID": "54321", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8"}


# SLURM's variables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[01-03,7]", ["n01", "n02", "n03", "n7"]),
        ("gpu-[098-101],login", ["gpu-098", "gpu-099", "gpu-100", "gpu-101", "login"]),
        ("r[1-2]n[3,05]x,a.b", ["r1n3x", "r1n05x", "r2n3x", "r2n05x", "a.b"]),
    ],
)
def test_lists_of_nodes(text, names):
    assert allocation.expand(text) == names


@pytest.mark.parametrize("text", ["", "n[1-2", "n[a-b]", "n[1-]"])
def test_a_list_that_is_none(text):
    with pytest.raises(ValueError, match="SLURM_JOB_NODELIST is"):
        allocation.expand(text)


def test_a_job_of_gpus():
    env = JOB | {"SLURM_JOB_CPUS_PER_NODE": "96(x1),72", "SLURM_RESTART_COUNT": "3"}
    found = allocation.from_slurm(env, None, "auto")
    assert found == Allocation(job="54321", nodes=("n1", "n2"), processes=8, cpus=72, requeues=3)
    assert found.world == 16


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "h100:4,a100:2"}, 6),
        ({"SLURM_GPUS": "16"}, 8),
        ({"SLURM_JOB_GPUS": "0,1,2"}, 3),
    ],
)
def test_gpus_of_a_node(variables, count):
    env = {name: value for name, value in JOB.items() if "GPUS" not in name} | variables
    assert allocation.from_slurm(env, None, "cuda").processes == count


def test_a_job_without_gpus():
    env = {name: value for name, value in JOB.items() if "GPUS" not in name}
    assert allocation.from_slurm(env, None, "cpu").processes == 1
    assert allocation.from_slurm(env, 3, "cpu").processes == 3
    with pytest.raises(ValueError, match="no GPUs.*--gpus-per-node=8.*--device cpu"):
        allocation.from_slurm(env, None, "auto")


@pytest.mark.parametrize(
    ("env", "processes", "words"),
    [
        ({}, None, "SLURM_JOB_ID is not set.*sbatch.*launch.py local"),
        (JOB, 4, "--nproc 4, and the job has 8 GPUs"),
        ({**JOB, "SLURM_GPUS_ON_NODE": ""}, 0, "--nproc 0.*at least 1"),
    ],
)
def test_an_allocation_that_is_refused(env, processes, words):
    with pytest.raises(ValueError, match=words):
        allocation.from_slurm(env, processes, "auto")


def test_the_address_is_slurms_when_the_name_is_none(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "NodeName=$3 NodeAddr=127.0.0.1 NodeHostName=vm"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert allocation.meeting_address("localhost") == "localhost"
    assert allocation.meeting_address("no-such-node.invalid") == "127.0.0.1"
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ValueError, match="no-such-node.invalid.*--master-addr"):
        allocation.meeting_address("no-such-node.invalid")


def test_a_port_that_is_taken_is_passed_over():
    import socket

    first = allocation.free_port(22000 + os.getpid() % 5000)
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert allocation.free_port(first) > first


def test_the_environment_is_the_users_first():
    found = environment.defaults({"NCCL_DEBUG": "INFO"}, "n1", 8, 96, "cuda")
    assert "NCCL_DEBUG" not in found and "GLOO_SOCKET_IFNAME" not in found
    assert found["OMP_NUM_THREADS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in found  # each rank sets it for its layout (cli/connections.py)
    found = environment.defaults({}, "127.0.0.1", 2, 9, "cpu")
    assert (found["OMP_NUM_THREADS"], found["GLOO_SOCKET_IFNAME"]) == ("4", "lo")


# Flags against the allocation ------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    """Checks flags for some nodes of some processes."""

    def check(words: str, nodes: int = 2, processes: int = 8, save: str = "run") -> preflight.Plan:
        names = tuple(f"n{i}" for i in range(nodes))
        given = ["--save", str(tmp_path / save)] if save else []
        return preflight.check([*words.split(), *given], Allocation(job="7", nodes=names, processes=processes))

    return check


def test_what_the_launcher_adds(plan, tmp_path):
    found = plan("--recipe paper-1b-intra --tensor-model-parallel-size 2")
    save = str(tmp_path / "run")
    assert found.argv[-3:] == ["--exit-signal-handler", "--load", save] and found.save == Path(save)
    assert str(found.layout) == "16 ranks: tensor 2, pipeline 1, context 1, expert 1, data 8"
    assert found.notes == []
    given = plan("--recipe paper-1b-intra --exit-signal-handler --load=elsewhere")
    assert given.argv.count("--exit-signal-handler") == 1 and given.argv.count("--load") == 0


def test_flags_of_a_recipe_count(plan):
    assert plan("--recipe demo").layout.expert == 2
    with pytest.raises(ValueError, match="3 ranks.*expert 2 x expert-tensor 1 x pipeline 1 needs a multiple of 2"):
        plan("--recipe demo", nodes=1, processes=3)


DENSE = "--hybrid-layer-pattern M-*-"


@pytest.mark.parametrize(
    ("words", "processes", "said"),
    [
        (f"{DENSE} --tensor-model-parallel-size 3", 8, "16 ranks.*tensor 3.*multiple of 3"),
        (f"{DENSE} --context-parallel-size=5", 8, "context 5"),
        (f"{DENSE} --tensor-model-parallel-size 16", 8, "16, and a node runs 8 ranks.*cross nodes"),
        (f"{DENSE} --tensor-model-parallel-size 4", 6, "4, and a node runs 6 ranks"),
        (f"{DENSE} --tensor-model-parallel-size 0", 8, "is 0; it is a number of ranks"),
        (f"{DENSE} --balance-pipeline 3", 8, "pipeline 3"),
        ("--recipe none", 8, "none"),
        ("--hybrid-layer-pattern M-Q", 8, "Q"),
    ],
)
def test_a_layout_that_is_refused(plan, words, processes, said):
    with pytest.raises(ValueError, match=said):
        plan(words, processes=processes)


def test_groups_that_cross_nodes_and_may(plan):
    found = plan(f"{DENSE} --tensor-model-parallel-size 4 --context-parallel-size 4")
    assert len(found.notes) == 1 and "context-parallel groups cross nodes" in found.notes[0]
    assert plan(f"{DENSE} --tensor-model-parallel-size 16", nodes=1, processes=16).notes == []


@pytest.mark.parametrize("flag", ["--ckpt-step 20", "--finetune", "--no-load-optim", "--no-load-rng"])
def test_what_each_restart_would_do_again_is_refused(plan, tmp_path, flag):
    with pytest.raises(ValueError, match=f"{flag.split()[0]}, and the run loads from its own folder.*each restart"):
        plan(f"{DENSE} {flag}")
    plan(f"{DENSE} {flag} --load {tmp_path}/other")  # of the first start alone
    assert plan(f"{DENSE} --no-load-optim --no-save-optim").save == tmp_path / "run"  # a run without moments


def test_a_folder_must_be_named_and_have_a_parent(plan):
    with pytest.raises(ValueError, match="--save is not given"):
        plan(DENSE, save="")
    with pytest.raises(ValueError, match="scratch does not exist.*mounted"):
        plan(DENSE, save="scratch/run")


# Events ----------------------------------------------------------------------------------------------


def test_events_come_back_by_time_and_incomplete_lines_do_not(tmp_path):
    late = Event(kind="death", node="n2", requeue=0, reason="exit code 1", rank=3, code=1, time=2.0)
    early = replace(late, node="n1", rank=0, time=1.0, last_words="ValueError: x")
    for event in (late, early):
        events.append(tmp_path, event)
    with (tmp_path / "events_n2.jsonl").open("a") as stream:
        stream.write('{"kind": "dea')
    assert events.read(tmp_path) == [early, late]
    assert events.read(tmp_path / "nowhere") == []


def test_reasons_and_last_words(tmp_path):
    assert events.reason(-signal.SIGSEGV) == "SIGSEGV"
    assert events.reason(-64) == "SIGRTMAX" and events.reason(3) == "exit code 3"
    assert "mistake" in events.reason(2) and "out-of-memory" in events.reason(-9)
    log = tmp_path / "rank_000.log"
    log.write_text("Traceback\n[rank0]: torch.OutOfMemoryError: CUDA out of memory\n[rank0]: of 80 GiB\n\n")
    assert events.last_words(log) == "[rank0]: torch.OutOfMemoryError: CUDA out of memory"
    log.write_text("iteration 1\niteration 2\n")
    assert events.last_words(log) == "iteration 2"
    assert events.last_words(tmp_path / "none") == ""


# What follows an end ---------------------------------------------------------------------------------

STOPPED = State(status="stopped", reason="signal", iteration=5, train_iters=9)
DEATH = Event(kind="death", node="n1", requeue=0, reason="SIGKILL", rank=1, code=-9)


@pytest.mark.parametrize(
    ("state", "code", "signalled", "seen", "starts", "again"),
    [
        (State(status="finished"), 0, False, [], 1, False),
        (State(status="finished"), 0, True, [], 1, False),  # the signal came too late to matter
        (STOPPED, 0, True, [], 1, True),
        (STOPPED, 0, False, [], 1, True),
        (replace(STOPPED, reason="flag"), 0, False, [], 1, False),
        (replace(STOPPED, reason="flag"), 0, True, [], 1, False),
        (State(status="failed", reason="result validation"), 17, False, [], 1, False),
        (State(status="running"), 137, True, [DEATH], 3, True),  # the grace was too short
        (State(status="running"), 137, True, [DEATH], 4, False),  # and always will be
        (None, 143, True, [], 9, True),  # it was still starting
        (State(status="running"), 1, False, [DEATH], 1, True),
        (State(status="running"), 1, False, [DEATH], 3, True),
        (State(status="running"), 1, False, [DEATH], 4, False),
        (State(status="running"), 1, False, [replace(DEATH, code=2)], 1, False),
        (State(status="running"), 1, True, [replace(DEATH, code=16)], 1, False),
        (None, 0, False, [], 1, False),
        (None, 143, True, [], 1, True),
        (None, 1, False, [], 1, True),
    ],
)
def test_what_follows(state, code, signalled, seen, starts, again):
    found = requeue.decide(state, code, signalled, seen, starts, most=3)
    assert found.requeue == again
    if state and state.status == "finished":
        assert found.code == 0
    elif any(event.code == 2 for event in seen):
        assert found.code == 2


@pytest.mark.parametrize(
    ("job", "again"),
    [
        ("JobState=RUNNING Reason=None", True),
        ("JobState=RUNNING Reason=None\n Requeue=1 Restarts=0", True),
        ("JobState=RUNNING Reason=None\n Requeue=0 Restarts=0", False),
        ("JobState=COMPLETING Reason=None Dependency=(null)", False),
        ("JobState=CANCELLED Reason=None", False),
        ("JobState=COMPLETING Reason=TimeLimit", True),
        ("JobState=COMPLETING Reason=None\n PreemptTime=2026-01-01T00:00:00", True),
        ("", True),  # SLURM did not answer
    ],
)
def test_a_cancelled_job_is_not_queued_again(job, again):
    assert requeue.unless_cancelled(requeue.Next(True, "told", 0), job).requeue == again


# Screens ---------------------------------------------------------------------------------------------


def rows(screen: str) -> dict[str, str]:
    lines = screen.splitlines()
    assert lines[0].startswith("==== launch: ") and lines[-1] == "====" and len(lines) < 30
    return {line[:13].strip(): line[14:] for line in lines[1:-1]}


def test_the_first_screen(plan, tmp_path):
    words = f"{DENSE} --tensor-model-parallel-size 4 --context-parallel-size 4"
    found = rows(
        summary.start(
            Allocation(job="7", nodes=tuple(f"n{i}" for i in range(9)), processes=8, requeues=1),
            plan(words),
            tmp_path / "logs",
            3,
            300.0,
        )
    )
    assert (found["job"], found["nodes"]) == ("7 (start 2)", "9 (n0 to n8), 8 ranks on each")
    assert found["pattern"] == "M-*-" and found["checkpoint"] == "none" and "cross nodes" in found["note"]
    assert found["restarts"] == "at most 3 when a rank fails; 300 s to save after SIGTERM"


def test_the_last_screen(tmp_path):
    write_state(tmp_path, STOPPED)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 5, "loss": 2.5}\n')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    run = Progress(tmp_path)
    run.update()
    later = replace(DEATH, node="n2", rank=3, time=DEATH.time + 1)
    seen = [replace(DEATH, last_words="RuntimeError: of rank 1"), later]
    found = rows(summary.end("7", run, tmp_path / "logs", True, seen, "requeued: told", 90.0))
    assert found["state"] == "stopped (signal)" and found["loss"] == "2.5000" and found["checkpoint"] == "5"
    assert found["first failure"].startswith("rank 1 on n1, ") and found["first failure"].endswith("restart 0: SIGKILL")
    assert found[""] == "RuntimeError: of rank 1" and found["next"] == "requeued: told"
    assert found["failures"] == "in 1 of the starts of all ranks"
    silent = rows(summary.end("7", run, tmp_path / "logs", False, [], "no more: x", 90.0))
    assert silent["state"].startswith("unknown") and silent["failures"] == "none"
