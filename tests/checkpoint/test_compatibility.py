"""Which checkpoints a run may go on from."""

from pathlib import Path

from tests.support.program import is_one_paragraph, program
from tests.support.training import folder, initial_checkpoint


def refusal_of_checkpoint(load: str, pattern: str) -> str:
    """The error of loading a checkpoint with another pattern, or nothing."""
    from argparse import Namespace

    from megatron_hybrid.checkpoint.compatibility import check_checkpoint
    from megatron_hybrid.run_folder.checkpoints import checkpoints

    found = checkpoints(Path(load))
    folder = str(found[0].folder) if found else None
    args = Namespace(checkpoint=folder, hybrid_layer_pattern=pattern, padded_vocab_size=None, rank=0)
    args.notes, args.allow_changed, args.skip_train, args.ckpt_format = [], [], True, "torch_dist"
    try:
        check_checkpoint(args)
    except ValueError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_other_layers_is_refused_and_other_stages_are_not(ranks, tmp_path):
    where = folder(tmp_path / "checkpoint")
    ranks(1).run(initial_checkpoint, pattern="M-*-", folder=where, flags="--verify-integrity")
    code, out, errors = ranks(1).run(program, line=f"--hybrid-layer-pattern M-W- --load {where}")[0]
    assert is_one_paragraph(code, "", errors), errors
    for word in (where, "M-*-", "M-W-", "--load"):
        assert word in errors
    for pattern, error in (("M-*-", False), ("M-|*-", False), ("M|-*|-", False), ("M-*-M-", True)):
        assert bool(ranks(1).run(refusal_of_checkpoint, load=where, pattern=pattern)[0]) == error, pattern
    empty = folder(tmp_path / "empty")
    assert ranks(1).run(refusal_of_checkpoint, load=empty, pattern="M-")[0] == ""
