"""The faults of the campaign. Each takes a run that is training, waits for a random moment, and strikes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from megatron_hybrid.run_folder.checkpoints import POINTER
from megatron_hybrid.run_folder.state import read_state
from tests.faults.run import SAVE_INTERVAL, Run

KINDS: dict[str, Callable[[Run], None]] = {}


def kind(name: str) -> Callable:
    def named(fault: Callable[[Run], None]) -> Callable[[Run], None]:
        KINDS[name] = fault
        return fault

    return named


# Processes -------------------------------------------------------------------------------------------


@kind("kill -9 of rank 0")
def kill_rank_0(run: Run) -> None:
    run.somewhere()
    run.signal(run.rank(0), signal.SIGKILL)


@kind("kill -9 of another rank")
def kill_rank_1(run: Run) -> None:
    run.somewhere()
    run.signal(run.rank(1), signal.SIGKILL)


@kind("kill -9 of the launcher")
def kill_launcher(run: Run) -> None:
    run.somewhere()
    run.signal(run.launcher, signal.SIGKILL)


@kind("kill -9 of a rank in a save")
def kill_in_save(run: Run) -> None:
    run.in_a_save()
    run.signal(run.rank(run.random.randrange(2)), signal.SIGKILL)


# The word to stop ------------------------------------------------------------------------------------


@kind("SIGTERM in a step")
def term_in_step(run: Run) -> None:
    run.somewhere()
    run.signal(run.launcher, signal.SIGTERM)


@kind("SIGTERM in a save")
def term_in_save(run: Run) -> None:
    run.in_a_save()
    run.signal(run.launcher, signal.SIGTERM)


@kind("SIGTERM in an evaluation")
def term_in_evaluation(run: Run) -> None:
    run.in_an_evaluation()
    run.signal(run.launcher, signal.SIGTERM)


# Disks and files -------------------------------------------------------------------------------------


@kind("full disk in a save")
def full_disk(run: Run) -> None:
    """The run's file system is filled up, and emptied again when the ranks have died of it."""
    run.somewhere()
    run.strike()
    first, ballast, left = run.rank(0), run.save / "ballast", run.random.randint(0, 1_000_000)

    def dead() -> bool:
        fill(ballast, left)  # and what retention gives back
        return not first.is_running() or first.status() == "zombie"

    run.until(dead, "the ranks die of it")
    ballast.unlink()


def fill(path: Path, leave: int) -> None:
    """Takes all room but ``leave`` bytes."""
    with path.open("ab", buffering=0) as file:
        try:
            while (room := os.statvfs(path).f_bavail * os.statvfs(path).f_frsize - leave) > 0:
                file.write(bytes(min(room, 1 << 20)))
        except OSError:
            return


@kind("truncated shard")
def truncated_shard(run: Run) -> None:
    run.somewhere()
    path = run.random.choice([path for path in sorted(run.stop().glob("*.distcp")) if path.stat().st_size])
    os.truncate(path, run.random.randrange(path.stat().st_size))
    run.strike()


@kind("flipped byte")
def flipped_byte(run: Run) -> None:
    run.somewhere()
    files = [p for p in sorted(run.stop().iterdir()) if p.stat().st_size and p.name != "integrity.json"]
    path = run.random.choice(files)
    with path.open("r+b") as file:
        at = run.random.randrange(path.stat().st_size)
        file.seek(at)
        byte = file.read(1)[0] ^ 1 << run.random.randrange(8)
        file.seek(at)
        file.write(bytes([byte]))
    run.strike()


@kind("missing metadata or shard")
def missing_file(run: Run) -> None:
    run.somewhere()
    folder = run.stop()
    names = [".metadata", "metadata.json", run.random.choice(sorted(p.name for p in folder.glob("*.distcp")))]
    (folder / run.random.choice(names)).unlink()
    run.strike()


@kind("corrupt integrity manifest")
def corrupt_manifest(run: Run) -> None:
    run.somewhere()
    path = run.stop() / "integrity.json"
    os.truncate(path, run.random.randrange(path.stat().st_size))
    run.strike()


@kind("deleted pointer")
def deleted_pointer(run: Run) -> None:
    run.somewhere()
    run.stop()
    (run.save / POINTER).unlink()
    run.strike()


@kind("garbled pointer")
def garbled_pointer(run: Run) -> None:
    run.somewhere()
    run.stop()
    (run.save / POINTER).write_bytes(run.random.randbytes(run.random.randrange(12)))
    run.strike()


# Numbers ---------------------------------------------------------------------------------------------


@kind("NaN in the loss, once")
def nan_in_loss(run: Run) -> None:
    """A fault that does not come back: the run ends without a checkpoint of it, and a person starts it again."""
    run.somewhere()
    at = run.iteration() + run.random.randint(3, SAVE_INTERVAL + 2)
    run.order.write_text(f"{at} {run.random.randrange(2)}")
    run.until(lambda: not run.order.exists(), f"iteration {at} has begun")
    run.strike()
    run.wait_for_the_launcher()
    state = read_state(run.save)
    if state is None or (state.status, state.reason) != ("failed", "result validation"):
        run.verdicts[-1].wrong = f"after a NaN the run says {state}"
    if run.sealed()[0].iteration >= at:
        run.verdicts[-1].wrong = f"a step with NaN was saved: {run.sealed()[0].folder}"
