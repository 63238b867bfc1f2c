"""What ranks agree on through torchrun's store, before there is a process group."""

import json
import time
import uuid
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, PrefixStore, Store

from megatron_hybrid.run_folder.checkpoints import Unreachable, passing, size

SLOWEST = 20e6
"""Bytes a second at which the slowest rank is taken to read its share; beyond that it is taken to hang."""

CheckShare = Callable[[Path, int, int], list[str]]
"""A checkpoint's folder (or what else is read), this rank and the number of ranks, to what is wrong with this rank's
share of it (or what else it has found)."""
Decide = Callable[[Callable[[Path], list[str]]], dict[str, Any]]
"""What the ranks together find in a folder, to a decision that JSON can hold."""
CHECKPOINT = "the checkpoint to load"


def among_ranks(
    args: Namespace,
    decide: Decide,
    check_share: CheckShare,
    about: str = CHECKPOINT,
    bytes_of: Callable[[Path], int] = size,
    alone: bool = False,
) -> dict[str, Any]:
    """:func:`agree` with the ranks of a run, by Megatron's arguments; a single one, or ``alone``, decides by itself."""
    if alone or args.world_size == 1:
        try:
            return decide(lambda folder: check_share(folder, 0, 1))
        except OSError as error:
            text = f"{about[0].upper()}{about[1:]} was not found out: {error}"
            raise (Unreachable if passing(error) else ValueError)(text) from None
    patience_s = 60.0 * args.distributed_timeout_minutes
    try:
        _kept.append(rendezvous_store(patience_s))
    except RuntimeError as error:
        raise Unreachable(
            f"Rank {args.rank} of {args.world_size} does not reach the store of the run's ranks ({error}). Start all "
            "ranks by torchrun, or check MASTER_ADDR and MASTER_PORT."
        ) from None
    return agree(_kept[-1], args.rank, args.world_size, decide, check_share, patience_s, about, bytes_of)


_kept: list[Any] = []
"""The store, as long as the process lives: without torchrun rank 0 serves it for the others."""


def rendezvous_store(patience_s: float) -> Store:
    """The store of the run's ranks: torchrun's, or one that rank 0 serves where the ranks were started otherwise.

    Megatron's process group will use the same server later; rank 0's ends with the last reference to it.
    """
    from torch.distributed import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=patience_s))))
    return store


def agree(
    store: Store,
    rank: int,
    ranks: int,
    decide: Decide,
    check_share: CheckShare,
    patience_s: float,
    about: str = CHECKPOINT,
    bytes_of: Callable[[Path], int] = size,
) -> dict[str, Any]:
    """Rank 0 decides, with what all ranks find in their shares; all ranks come to its decision or to its error.

    Args:
        store: Of all ranks. What an earlier start of the run left in it does not matter.
        rank: This one.
        ranks: Number of ranks.
        decide: Called on rank 0. A ValueError or OSError of it is every rank's.
        check_share: Called on every rank for each folder that ``decide`` asks about.
        patience_s: How long to wait for another rank's start, and for its answer beside the time that reading takes.
        about: What is agreed on, for errors.
        bytes_of: How much all ranks together read of a folder.

    Raises:
        ValueError: ``decide`` says so.
        Unreachable: It or ``check_share`` failed by another error on some rank, or a rank has not answered in time.
    """
    try:
        if rank == 0:
            session = PrefixStore(_invite(store, ranks, patience_s, about), store)
            return _lead(session, ranks, decide, check_share, patience_s, about, bytes_of)
        session = PrefixStore(_join(store, rank, patience_s), store)
        return _follow(session, rank, ranks, check_share, patience_s)
    except DistError as error:
        raise Unreachable(
            f"Rank {rank} of {ranks} lost the others while they agreed on {about} ({error}). See the log of the "
            f"rank that failed first; check that the nodes see each other, and {about}."
        ) from None


def _invite(store: Store, ranks: int, patience_s: float, about: str) -> str:
    """Rank 0: opens a session, whose name only ranks of this start of the run get.

    A restarted run finds the keys of the one before in torchrun's store. A rank is invited by a token of its own.
    """
    session, deadline = f"megatron_hybrid/{uuid.uuid4().hex}", time.monotonic() + patience_s
    missing, invited = set(range(1, ranks)), dict[int, bytes]()
    while missing:
        for rank in sorted(missing):
            if not store.check([f"megatron_hybrid/here/{rank}"]):
                continue
            token = store.get(f"megatron_hybrid/here/{rank}")
            if invited.get(rank) != token:
                store.set(f"megatron_hybrid/invited/{token.decode()}", session)
                invited[rank] = token
        missing = {rank for rank in missing if not store.check([f"{session}/joined/{rank}"])}
        if missing and time.monotonic() > deadline:
            raise _late(missing, patience_s, about)
        time.sleep(0.02 if missing else 0)
    return session


def _join(store: Store, rank: int, patience_s: float) -> str:
    token = uuid.uuid4().hex
    store.set(f"megatron_hybrid/here/{rank}", token)
    key = f"megatron_hybrid/invited/{token}"
    store.wait([key], timedelta(seconds=patience_s))
    session = store.get(key).decode()
    store.set(f"{session}/joined/{rank}", "")
    return session


def _lead(
    store: Store,
    ranks: int,
    decide: Decide,
    check_share: CheckShare,
    patience_s: float,
    about: str,
    bytes_of: Callable[[Path], int],
) -> dict[str, Any]:
    asked = 0

    def tell(message: dict[str, Any]) -> None:
        nonlocal asked
        store.set(f"told/{asked}", json.dumps(message))
        asked += 1

    def answers(what: str, seconds: float) -> list[str]:
        keys = {rank: f"{what}/{rank}" for rank in range(1, ranks)}
        try:
            store.wait(list(keys.values()), timedelta(seconds=seconds))
        except DistError:
            late = {rank for rank, key in keys.items() if not store.check([key])}
            raise _late(late, seconds, about) from None
        return [text.decode() for text in store.multi_get(list(keys.values()))]

    def check(folder: Path) -> list[str]:
        seconds = patience_s + bytes_of(folder) / ranks / SLOWEST
        tell({"folder": str(folder), "seconds": seconds})
        found = [_checked(check_share, folder, 0, ranks)]
        found += [json.loads(text) for text in answers(f"found/{asked}", seconds)]
        for answer in found:
            if "unreachable" in answer:
                raise Unreachable(answer["unreachable"])
        return list(dict.fromkeys(text for answer in found for text in answer["wrong"]))

    try:
        decision: dict[str, Any] = decide(check)
    except (ValueError, OSError) as error:
        kind = Unreachable if isinstance(error, OSError) and passing(error) else ValueError
        tell({"error": str(error), "unreachable": kind is Unreachable})
        answers("heard", patience_s)  # the store may end with this process
        raise kind(str(error)) from None
    tell({"decision": decision})
    return decision


def _follow(store: Store, rank: int, ranks: int, check_share: CheckShare, patience_s: float) -> dict[str, Any]:
    told, seconds = 0, patience_s
    while True:
        store.wait([f"told/{told}"], timedelta(seconds=seconds + patience_s))
        message = json.loads(store.get(f"told/{told}"))
        told += 1
        if "folder" in message:
            seconds = message["seconds"]  # rank 0 waits that long for the slowest
            store.set(f"found/{told}/{rank}", json.dumps(_checked(check_share, Path(message["folder"]), rank, ranks)))
            continue
        store.set(f"heard/{rank}", "")
        if "error" in message:
            raise (Unreachable if message["unreachable"] else ValueError)(message["error"])
        return message["decision"]


def _checked(check_share: CheckShare, folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    try:
        return {"wrong": check_share(folder, rank, ranks)}
    except Exception as error:  # whatever it is, the other ranks wait for an answer
        return {"unreachable": f"{folder} could not be checked on rank {rank} ({type(error).__name__}: {error})"}


def _late(ranks: set[int], seconds: float, about: str) -> Unreachable:
    few = ", ".join(map(str, sorted(ranks)[:8])) + (" ..." if len(ranks) > 8 else "")
    return Unreachable(
        f"{'Ranks' if len(ranks) > 1 else 'Rank'} {few} did not answer in {seconds:.0f} s while the ranks agreed on "
        f"{about}. See their logs; --distributed-timeout-minutes sets how long the others wait."
    )
