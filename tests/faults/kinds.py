"""The faults of the campaign. Each takes a trial that has been started, and strikes at a random moment."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hybrid.run_folder.checkpoints import POINTER
from megatron_hybrid.run_folder.state import read_state
from tests.faults.trial import ITERATIONS, SAVE_INTERVAL, Trial

KILL, TERM = signal.SIGKILL, signal.SIGTERM
KINDS: dict[str, Callable[[Trial], None]] = {}


def kind(name: str) -> Callable:
    def named(fault: Callable[[Trial], None]) -> Callable[[Trial], None]:
        KINDS[name] = fault
        return fault

    return named


# Processes -------------------------------------------------------------------------------------------


@kind("kill -9 of rank 0")
def kill_rank_0(trial: Trial) -> None:
    trial.start()
    trial.somewhere_in_training()
    trial.signal(trial.rank(0), KILL)


@kind("kill -9 of another rank")
def kill_rank_1(trial: Trial) -> None:
    trial.start()
    trial.somewhere_in_training()
    trial.signal(trial.rank(1), KILL)


@kind("kill -9 of the launcher")
def kill_launcher(trial: Trial) -> None:
    trial.start()
    trial.somewhere_in_training()
    trial.signal(trial.launcher, KILL)


@kind("kill -9 of a rank in a save")
def kill_in_save(trial: Trial) -> None:
    trial.start()
    trial.in_a_save()
    trial.signal(trial.rank(trial.random.randrange(2)), KILL)


@kind("kill -9 of a rank in a background save")
def kill_in_background_save(trial: Trial) -> None:
    trial.more = ["--async-save"]
    trial.start()
    trial.in_a_save()
    trial.signal(trial.rank(trial.random.randrange(2)), KILL)


# The word to stop ------------------------------------------------------------------------------------


@kind("SIGTERM in a step")
def term_in_step(trial: Trial) -> None:
    trial.start()
    trial.somewhere_in_training()
    trial.signal(trial.launcher, TERM)


@kind("SIGTERM in a save")
def term_in_save(trial: Trial) -> None:
    trial.start()
    trial.in_a_save()
    trial.signal(trial.launcher, TERM)


@kind("SIGTERM in a background save")
def term_in_background_save(trial: Trial) -> None:
    trial.more = ["--async-save"]
    trial.start()
    trial.in_a_save()
    trial.signal(trial.launcher, TERM)


@kind("SIGTERM in an evaluation")
def term_in_evaluation(trial: Trial) -> None:
    trial.start()
    trial.in_an_evaluation()
    trial.signal(trial.launcher, TERM)


# Disks and files -------------------------------------------------------------------------------------


@kind("full disk in a save")
def full_disk(trial: Trial) -> None:
    """A file system of the run's own is filled up, and emptied again when the ranks have died of it."""
    with own_file_system(trial.run, megabytes=400):
        trial.start()
        trial.reach(trial.random.randint(SAVE_INTERVAL + 1, ITERATIONS - 2 * SAVE_INTERVAL))
        trial.strike()
        ballast = trial.run / "ballast"
        with ballast.open("wb", buffering=0) as file:
            fill(file, leave=trial.random.randint(0, 2_000_000))
        first = trial.rank(0).pid
        trial.until(lambda: not Path(f"/proc/{first}").exists(), "the ranks die of it")
        ballast.unlink()
        trial.finish()
        shutil.copytree(trial.run, trial.folder / "kept", ignore=shutil.ignore_patterns("iter_*"))
    shutil.copytree(trial.folder / "kept", trial.run, dirs_exist_ok=True)


@contextmanager
def own_file_system(where: Path, megabytes: int) -> Iterator[None]:
    where.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


def fill(file, leave: int) -> None:
    """Takes all room but ``leave`` bytes."""
    block = bytes(1 << 20)
    try:
        while os.statvfs(file.fileno()).f_bavail * 4096 > leave + len(block):
            file.write(block)
        rest = os.statvfs(file.fileno()).f_bavail * 4096 - leave
        file.write(bytes(max(0, rest)))
    except OSError:
        return


def stopped(trial: Trial) -> Path:
    """Lets the run save twice or more and stop, by SIGTERM or kill -9; its newest checkpoint."""
    trial.start()
    trial.until(lambda: len(trial.sealed()) >= 2, "two checkpoints are sealed")
    trial.somewhere_in_training()
    trial.launcher.send_signal(trial.random.choice([KILL, TERM]))
    trial.wait_for_the_launcher()
    trial.until_nobody_is_left()
    return trial.newest()


@kind("truncated shard")
def truncated_shard(trial: Trial) -> None:
    shards = sorted(stopped(trial).glob("*.distcp"))
    path = trial.random.choice([path for path in shards if path.stat().st_size])
    os.truncate(path, trial.random.randrange(path.stat().st_size))
    trial.strike()


@kind("missing shard")
def missing_shard(trial: Trial) -> None:
    trial.random.choice(sorted(stopped(trial).glob("*.distcp"))).unlink()
    trial.strike()


@kind("flipped byte")
def flipped_byte(trial: Trial) -> None:
    files = [p for p in sorted(stopped(trial).iterdir()) if p.stat().st_size and p.name != "integrity.json"]
    path = trial.random.choice(files)
    with path.open("r+b") as file:
        at = trial.random.randrange(path.stat().st_size)
        file.seek(at)
        byte = file.read(1)[0] ^ 1 << trial.random.randrange(8)
        file.seek(at)
        file.write(bytes([byte]))
    trial.strike()


@kind("missing metadata")
def missing_metadata(trial: Trial) -> None:
    (stopped(trial) / trial.random.choice([".metadata", "metadata.json"])).unlink()
    trial.strike()


@kind("torn integrity manifest")
def torn_manifest(trial: Trial) -> None:
    path = stopped(trial) / "integrity.json"
    os.truncate(path, trial.random.randrange(path.stat().st_size))
    trial.strike()


@kind("deleted pointer")
def deleted_pointer(trial: Trial) -> None:
    stopped(trial)
    (trial.run / POINTER).unlink()
    trial.strike()


@kind("garbled pointer")
def garbled_pointer(trial: Trial) -> None:
    stopped(trial)
    (trial.run / POINTER).write_bytes(trial.random.randbytes(trial.random.randrange(12)))
    trial.strike()


# Numbers ---------------------------------------------------------------------------------------------


@kind("NaN in the loss, once")
def nan_in_loss(trial: Trial) -> None:
    """A fault that does not come back: the run ends without a checkpoint of it, and a person starts it again."""
    trial.program = Path(__file__).with_name("nan_program.py")
    at = trial.random.randint(SAVE_INTERVAL + 1, ITERATIONS - 1)
    (trial.folder / "nan").write_text(f"{at} {trial.random.randrange(2)}")
    trial.variables["FAULT_NAN"] = str(trial.folder / "nan")
    trial.start()
    trial.reach(at - 1)
    trial.strike()
    trial.wait_for_the_launcher()
    state = read_state(trial.run)
    if state is None or (state.status, state.reason) != ("failed", "result validation"):
        trial.verdict.wrong.append(f"after a NaN the run says {state}")
    if trial.sealed()[0].iteration >= at:
        trial.verdict.wrong.append(f"a step with NaN was saved: {trial.newest()}")
