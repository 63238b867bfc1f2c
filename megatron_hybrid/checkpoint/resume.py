"""Which checkpoint a run loads: found by content, agreed on by all ranks, before anything is unpickled."""

import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hybrid.patches.hooks import Wrapper
from megatron_hybrid.run_folder.checkpoints import (
    POINTER,
    Checkpoint,
    Unreachable,
    checkpoints,
    choose,
    is_sealed,
    point_to,
    pointer,
    problems,
    size,
)

Check = Callable[[Path], list[str]]


def choose_checkpoint(args: Namespace, alone: bool = False) -> list[str]:
    """Finds the latest valid checkpoint and makes Megatron load that one, or nothing if there are none.

    Megatron itself ends with exit code 0 where the pointer is garbled (training/checkpointing.py:353), starts from
    random weights where it is missing (:1687), and loads flipped bytes. Here all ranks hash their shares of the files
    and come to one choice. ``args.ckpt_step`` is set to it; ``args.checkpoint`` is its folder, or None. Where the run
    saves into the same folder and the pointer leads elsewhere, rank 0 writes the pointer anew.

    Args:
        args: Megatron's, parsed; ``rank`` and ``world_size`` as torchrun says.
        alone: Decide in this process, and write nothing: for ``--print-config``.

    Returns:
        Notes for the user.

    Raises:
        ValueError: On all ranks alike: checkpoints are there and none can be loaded, or Megatron cannot be led to it.
        Unreachable: Likewise; files or ranks do not answer, and another start may find them well.
    """
    from megatron_hybrid.checkpoint import agreement

    args.checkpoint = None
    notes = _go_on_from_own(args)
    if args.load is None and args.pretrained_checkpoint is None:
        return []
    if args.non_persistent_ckpt_type is not None and not args.load_unverified:
        raise ValueError(
            f"--non-persistent-ckpt-type {args.non_persistent_ckpt_type}: such checkpoints have no manifests, and "
            "would be loaded without a check. Drop it, or give --load-unverified."
        )

    def check_share(folder: Path, part: int, parts: int) -> list[str]:
        if args.load_unverified and not is_sealed(folder):
            return _unfinished(folder)
        return problems(folder, part, parts)

    decision = agreement.among_ranks(
        args, lambda check: _decide(args, check, write=not alone), check_share, alone=alone
    )
    if decision["folder"] is not None:
        _check_optimizer(args, decision["folder"])
        args.checkpoint, args.ckpt_step = decision["folder"], decision["step"]
        _see_pointer(decision)
    return notes + decision["notes"]


def _check_optimizer(args: Namespace, folder: str) -> None:
    """Refuses to go on without the moments: upstream leaves them uninitialised then (training/checkpointing.py:1338).

    What it does not save, it does not ask a checkpoint for either.

    Raises:
        ValueError: With the flag to drop or to add.
    """
    if args.no_save_optim and not takes_weights_alone(args, folder) and not args.skip_train:
        raise ValueError(
            f"--no-save-optim, and the run goes on from {folder}: Megatron would not load the optimizer's moments, and "
            "train with what memory holds. Drop --no-save-optim, or give --no-load-optim for fresh moments."
        )


def takes_weights_alone(args: Namespace, folder: str) -> bool:
    """Whether the run starts its optimizer and its schedule anew, with the weights of a checkpoint.

    As Megatron has it: training/checkpointing.py:2208.
    """
    from_pretrained = args.load is None or Path(args.load) not in Path(folder).parents
    return bool(args.no_load_optim or args.finetune or from_pretrained or Path(folder).name == "release")


def _go_on_from_own(args: Namespace) -> list[str]:
    """Makes a run whose --save folder has checkpoints go on from these, wherever its first start has loaded from.

    The same command then starts a run and starts it again. --ckpt-step is an iteration of --load.

    Raises:
        ValueError: Nothing is to be loaded, and the run would write over what is there.
    """
    if args.save is None or args.skip_train or not checkpoints(Path(args.save)):
        return []
    if args.load is None and args.pretrained_checkpoint is None:
        raise ValueError(
            f"--save {args.save} has checkpoints, and without --load the run would start from fresh weights and write "
            f"over them. To go on: --load {args.save}. To start anew: another --save."
        )
    if args.load is not None and os.path.realpath(args.load) == os.path.realpath(args.save):
        return []
    other = args.load or args.pretrained_checkpoint
    args.load, args.finetune, args.ckpt_step = args.save, False, None
    args.no_load_optim, args.no_load_rng = args.no_save_optim, args.no_save_rng  # what is there, not what the other had
    return [f"--save {args.save} has checkpoints: the run goes on from these, no more from {other}"]


def verified(folder: str, unverified: bool = False) -> Path:
    """The folder of the checkpoint that a tool is to open: the latest valid one of a run, or the given one.

    Args:
        folder: A run's folder, or a checkpoint's own.
        unverified: Take one without a manifest, too.

    Raises:
        ValueError: It is not whole, or has no manifest.
    """
    path = Path(folder)

    def check(where: Path) -> list[str]:
        return _unfinished(where) if unverified and not is_sealed(where) else problems(where)

    if checkpoints(path):
        choice = choose(path, None, check)
        assert choice.checkpoint is not None  # there are some, and else choose() raises
        return choice.checkpoint.folder
    if not _is_a_checkpoint(path):
        raise ValueError(
            f"{folder} has no checkpoint that can be read: give the --save folder of a run, or one of its iter_... "
            "folders, of the format torch_dist."
        )
    wrong = check(path)
    if wrong:
        raise ValueError(
            f"{folder}: {'; '.join(wrong[:2])}. Give a whole checkpoint; if it has no manifest and is trusted: "
            f"tools/verify_checkpoint.py --seal {folder}, or --load-unverified."
        )
    return path


def verify_others(folder: str) -> Wrapper:
    """A hook: Megatron loads a checkpoint that is verified here without hashing it again on rank 0, in one thread.

    Megatron does so under ``--verify-integrity``, and refuses then what has no manifest; other folders are verified as
    ever.
    """

    def verifying(verify: Callable) -> Callable:
        def verify_integrity_manifest(checkpoint_dir: str) -> None:
            if Path(checkpoint_dir).absolute() != Path(folder).absolute():
                verify(checkpoint_dir)

        return verify_integrity_manifest

    return verifying


def _decide(args: Namespace, check: Check, write: bool = True) -> dict[str, Any]:
    """What to load: folder (None: nothing), step, what the pointer says then and in which run, and notes."""
    start, fresh = time.monotonic(), []
    for flag, name in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if name is None:
            continue
        run = Path(name)
        if not checkpoints(run) and not (run / POINTER).exists() and not _is_a_checkpoint(run):
            fresh.append(f"{flag} {run} has no checkpoint")
            continue
        if _is_a_checkpoint(run):
            raise ValueError(
                f"{flag} {run} is a checkpoint's own folder: give {run.parent}, and --ckpt-step for one that is not "
                "the newest."
            )
        choice = choose(run, args.ckpt_step, check)
        assert choice.checkpoint is not None  # there are some, and else choose() raises
        return _lead(args, run, flag, choice.checkpoint, write) | {
            "notes": [*choice.notes, _loaded(choice.checkpoint.folder, time.monotonic() - start)]
        }
    must = args.pretrained_checkpoint is not None or args.exit_on_missing_checkpoint or args.ckpt_step is not None
    if fresh and (must or args.skip_train):
        raise ValueError(f"There is nothing to load: {', '.join(fresh)}. Give a folder that a run has saved in.")
    return {"folder": None, "notes": [f"{text}: the run starts from fresh weights" for text in fresh]}


def _lead(args: Namespace, run: Path, flag: str, checkpoint: Checkpoint, write: bool) -> dict[str, Any]:
    """Leads Megatron to a checkpoint: it goes by the pointer, and by ckpt_step where that is above 0.

    Raises:
        ValueError: It cannot be led there without a change in a folder that is not the run's own.
    """
    said: int | str | None = pointer(run)
    wanted = "release" if checkpoint.release else checkpoint.iteration
    step = checkpoint.iteration or None
    own = args.save is not None and Path(args.save).is_dir() and os.path.samefile(run, args.save)
    own = own and not args.skip_train  # an evaluation changes nothing in the run's folder
    kept = said == wanted or (isinstance(said, int) and step is not None)
    # without a pointer it goes by ckpt_step, but takes --pretrained-checkpoint where one is given
    kept = kept or not (run / POINTER).exists() and step is not None and args.pretrained_checkpoint is None
    if own and (not kept or (said != wanted and args.ckpt_step is None)):
        kept, said = True, wanted
        if write:
            point_to(run, checkpoint)
    if not kept:
        remedy = "start the run again, which mends it" if args.skip_train else "give the folder as --save, too"
        raise ValueError(
            f"{flag} {run}: {checkpoint.folder.name} can be loaded, but {POINTER} "
            f"{'is missing or cannot be read' if said is None else f'says {said}'}, and this run does not write "
            f"there: write {wanted} into that file, or {remedy}."
        )
    return {"folder": str(checkpoint.folder), "step": step, "run": str(run), "pointer": said if write else None}


def _see_pointer(decision: dict[str, Any], seconds: float = 60.0) -> None:
    """Waits until this node sees the pointer that rank 0 may have written: names on NFS are seen late.

    Raises:
        Unreachable: It does not.
    """
    run, said, deadline = Path(decision["run"]), decision["pointer"], time.monotonic() + seconds
    while said is not None and pointer(run) != said:
        if time.monotonic() > deadline:
            raise Unreachable(
                f"{run / POINTER} does not say {said} on this node as it does on the first rank's: all nodes need to "
                "see the same folder."
            )
        time.sleep(0.5)


def _loaded(folder: Path, seconds: float) -> str:
    if not is_sealed(folder):
        return f"loads {folder}, which has no manifest and was not verified (--load-unverified)"
    return f"loads {folder}: {size(folder) / 1e6:,.1f} MB verified in {seconds:.1f} s"


def _unfinished(folder: Path) -> list[str]:
    """What tells an unfinished checkpoint without a manifest from a finished one, of any format."""
    if (folder / "metadata.json").is_file():  # torch_dist, which writes it last
        there = (folder / ".metadata").is_file() and any(folder.glob("*.distcp"))
        return [] if there else ["lacks files: it has metadata.json, and no .metadata or no *.distcp"]
    if any(folder.glob("mp_rank_0*/*")):  # torch
        return []
    return ["has neither a manifest nor metadata.json: it is unfinished, or of a format that is not supported"]


def _is_a_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("metadata.json", ".metadata", "integrity.json"))
