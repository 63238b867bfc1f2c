"""What ranks agree on about a checkpoint that some of them cannot read. Ranks are threads with a store of torch."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

from torch.distributed import HashStore

from megatron_hybrid.checkpoint.agreement import agree
from megatron_hybrid.run_folder.checkpoints import Unreachable

RANKS = 3


def ends(decide: Callable, check_share: Callable) -> list:
    """What each rank comes to: a decision or an error."""
    store, found = HashStore(), [None] * RANKS

    def run(rank: int) -> None:
        try:
            found[rank] = agree(store, rank, RANKS, decide, check_share, patience_s=20.0)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def newest_whole(check: Callable) -> dict:
    for name in ("newer", "older"):
        if not check(Path("/", name)):
            return {"folder": name}
    raise ValueError("none is whole")


def test_a_checkpoint_that_is_corrupt_on_one_rank_is_skipped_by_all():
    found = ends(newest_whole, lambda folder, rank, ranks: ["corrupt"] if folder.name == "newer" and rank == 2 else [])
    assert found == [{"folder": "older"}] * RANKS


def test_an_error_of_the_decision_is_all_ranks():
    found = ends(newest_whole, lambda folder, rank, ranks: ["corrupt"])
    assert [(type(error), str(error)) for error in found] == [(ValueError, "none is whole")] * RANKS


def test_a_checkpoint_that_one_rank_cannot_read_is_not_skipped():
    """The run would lose steps that are saved, and write over a checkpoint that is whole."""

    def check_share(folder: Path, rank: int, ranks: int) -> list[str]:
        if rank == 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return []

    found = ends(newest_whole, check_share)
    for error in found:
        assert type(error) is Unreachable and "/newer could not be checked on rank 2" in str(error)
