"""The agents of nodes, with small programs instead of training: who is told, who is killed, who starts again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hybrid.launch import allocation, events

ROOT = Path(__file__).parents[2]
BOUND_S = 300.0
"""For anything that is to happen; the machine may be busy."""

# Stands for training. Each rank writes a file when it is ready, and answers SIGTERM by saving for SAVE_S seconds.
PROGRAM = """
import os, pathlib, signal, sys, time
rank, restart = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
folder, told = pathlib.Path(os.environ["RECORDS"]), []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
print(f"rank {rank} of {os.environ['WORLD_SIZE']}, node {os.environ.get('SLURM_NODEID')}, restart {restart}")
(folder / f"{rank}.{restart}.part").write_text(str(os.getpid()))
(folder / f"{rank}.{restart}.part").rename(folder / f"{rank}.{restart}")
if (folder / f"exit.{rank}").exists():
    # one that starts later than this one ends would be killed before it could say that it was there
    while len(list(folder.glob(f"*.{restart}"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)
    print("ValueError: of rank", rank)
    sys.exit(int((folder / f"exit.{rank}").read_text()))
while not told and not (folder / "finish").exists():
    time.sleep(0.05)
if told:
    time.sleep(float(os.environ["SAVE_S"]))
    (folder / f"saved.{rank}").touch()
"""


class Launched:
    """A launcher and what its ranks say."""

    def __init__(self, folder: Path, words: list[str], **variables: str):
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
        env = kept | {"RECORDS": str(folder), "SAVE_S": "0", "OMP_NUM_THREADS": "1"} | variables
        command = [sys.executable, str(ROOT / "tools/launch.py"), *words]
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def pid(self, rank: int, restart: int = 0) -> int:
        """Of a rank, once it is ready."""
        path = self.folder / f"{rank}.{restart}"
        until(path.exists, f"rank {rank} starts, restart {restart}", self.process)
        return int(path.read_text())

    def end(self) -> tuple[int, str]:
        """Exit code, and what was said."""
        said = self.process.communicate(timeout=BOUND_S)[0]
        return self.process.returncode, said

    def events(self) -> list[events.Event]:
        return events.read(next(self.folder.glob("run/logs/*")))


def until(done, what: str, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + BOUND_S
    while not done():
        ended = process is not None and process.poll() is not None
        assert time.monotonic() < deadline and not ended, f"{what}: not so"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether it runs; what has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def local(tmp_path):
    started = []

    def launch(*words: str, **variables: str) -> Launched:
        flags = ["--recipe", "demo", "--device", "cpu", "--save", "run"]
        own = ["local", "--nproc", "2", "--program", "program.py", *words, "--", *flags]
        started.append(Launched(tmp_path, own, **variables))
        return started[-1]

    yield launch
    for one in started:
        one.process.kill()


def test_a_dead_rank_starts_all_again_and_is_named(local, tmp_path):
    run = local("--max-restarts", "2")
    first, second = run.pid(0), run.pid(1)
    os.kill(second, signal.SIGKILL)
    assert run.pid(0, 1) != first and run.pid(1, 1) != second
    assert not alive(first)
    (tmp_path / "finish").touch()
    code, said = run.end()
    assert code == 0, said
    death = run.events()
    assert [(e.kind, e.rank, e.local_rank, e.pid, e.code, e.restart) for e in death] == [("death", 1, 1, second, -9, 0)]
    assert death[0].reason.startswith("SIGKILL") and "out-of-memory" in death[0].reason
    assert f"first failure rank 1 on {death[0].node}" in said and "restart 1 of at most 2" in said
    log = next(tmp_path.glob("run/logs/*/rank_001.log")).read_text().splitlines()
    assert log[0] == "rank 1 of 2, node None, restart 0" and log[-1] == "rank 1 of 2, node None, restart 1"
    assert "restarted" in log[-2]


def test_a_signal_leaves_time_to_save(local, tmp_path):
    run = local("--grace", "50", SAVE_S="4")
    for rank in (0, 1):
        run.pid(rank)
    run.process.send_signal(signal.SIGTERM)
    code, said = run.end()
    assert code == 0, said
    assert {path.name for path in tmp_path.glob("saved.*")} == {"saved.0", "saved.1"}
    assert [(e.kind, e.reason) for e in run.events()] == [("signal", "SIGTERM")]
    assert "call it again: the run was asked to stop" in said


@pytest.mark.parametrize("how", ["the grace", "a second Ctrl-C"])
def test_a_save_that_takes_too_long_is_ended(local, tmp_path, how):
    run = local("--grace", "1" if how == "the grace" else "500", SAVE_S="500")
    ranks = [run.pid(0), run.pid(1)]
    run.process.send_signal(signal.SIGINT)
    if how == "a second Ctrl-C":
        until(lambda: any(tmp_path.glob("run/logs/*/events_*.jsonl")), "the signal is noted")
        run.process.send_signal(signal.SIGINT)
    code, said = run.end()
    assert code == 128 + signal.SIGKILL, said
    assert not any(map(alive, ranks)) and not list(tmp_path.glob("saved.*"))
    assert [e.code for e in run.events() if e.kind == "death"] == [-9, -9]


@pytest.mark.parametrize("code", [2, 17])
def test_a_mistake_is_not_tried_again(local, tmp_path, code):
    (tmp_path / "exit.1").write_text(str(code))
    run = local()
    other = run.pid(0)
    found, said = run.end()  # the other rank would run for ever
    assert found == code, said
    assert not alive(other) and not (tmp_path / "0.1").exists()
    assert run.events()[0].last_words == "ValueError: of rank 1"
    assert "a restart would not help" in said


def test_nothing_is_left_of_a_launcher_that_was_killed(local):
    run = local()
    ranks = [run.pid(0), run.pid(1)]
    run.process.kill()
    until(lambda: not any(map(alive, ranks)), "the ranks end with their agent")


def test_two_nodes_restart_together_and_give_up_together(tmp_path):
    """Deaths on one node and on the other are one count, and ranks follow the numbers of the nodes."""
    port = allocation.free_port(21000 + os.getpid() % 5000)
    logs = tmp_path / "run/logs/7"
    logs.mkdir(parents=True)
    words = f"""node --master-addr 127.0.0.1 --master-port {port} --nodes 2 --nproc 1 --cpus 1 --requeue 0 --job 7
        --logs {logs} --max-restarts 1 --grace 9 --program program.py -- --device cpu""".split()
    nodes = [Launched(tmp_path, words, SLURM_NODEID=str(n), SLURMD_NODENAME=f"n{9 - n}") for n in (0, 1)]
    try:
        survivor = nodes[0].pid(0)
        os.kill(nodes[1].pid(1), signal.SIGKILL)
        nodes[1].pid(1, 1)  # the next death would end it before it could say that it was there
        os.kill(nodes[0].pid(0, 1), signal.SIGKILL)
        assert not alive(survivor)
        codes = [node.end()[0] for node in nodes]
    finally:
        for node in nodes:
            node.process.kill()
    assert 0 not in codes and not (tmp_path / "0.2").exists()
    deaths = [(e.rank, e.node, e.restart) for e in nodes[0].events() if e.kind == "death"]
    assert deaths == [(1, "n8", 0), (0, "n9", 1)]
    assert (logs / "rank_001.log").read_text().splitlines()[0] == "rank 1 of 2, node 1, restart 0"
    lines = [line for node in ("n8", "n9") for line in (logs / f"events_{node}.jsonl").read_text().splitlines()]
    assert all(json.loads(line)["requeue"] == 0 for line in lines)
