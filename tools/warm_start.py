"""Make the initial checkpoint of a model with P layers from trained checkpoints of other patterns.

    python tools/warm_start.py --from runs/inter --layers 3:attention=3,mamba=1 --save runs/start -- \\
        --recipe paper-1b-intra --hybrid-layer-pattern M-P-M- --intra-qk-dim 2048 ...the flags of the new run

Layers count from 1, in the pattern without "|". "3:attention=3,mamba=1" fills the branches of layer 3, a P, with the
mixers of layers 3 (* or W) and 1 (M) of the old model; "2.7" is layer 7 of the second folder of --from.
"5=7" copies a layer as it is. All other layers, the embedding and the norms come from the first folder, where it has
the same symbol in the same place; what is not found there, branches without a source, scales and gates are initialised.
The new run starts with --load runs/start, in any parallel layout.

What a branch computes then:
- Each branch reads what its stock layer read: if the input norms of two mixers differ, the ratio of their weights
  goes into one branch's input projection.
- An attention branch equals its layer exactly with --intra-norm none; else the norm after it is new. A W layer's
  window and RoPE base are flags of the run (--intra-window, --rotary-base), not weights.
- A Mamba branch equals its layer exactly with --intra-norm group --intra-norm-groups N, N being --mamba-num-groups:
  its own norm is over these groups, and that of a P layer over heads by default. With
  --intra-norm none its norm's weight goes into the output projection, and the norm itself is dropped.
- With an output projection for each branch both are added: --intra-fusion diff stores the second one with its sign.
  One for both (--intra-output joint with add or diff) can take one branch alone.
"""

import contextlib
import io
import sys
import warnings
from pathlib import Path

from megatron_hybrid.cli import flags, tool
from megatron_hybrid.layers.intra.design import design

# One process has the whole model; the checkpoint loads in any layout. Batches and data do not matter.
ALONE = [
    "--tensor-model-parallel-size=1",
    "--pipeline-model-parallel-size=1",
    "--context-parallel-size=1",
    "--expert-model-parallel-size=1",
    "--expert-tensor-parallel-size=1",
    "--micro-batch-size=1",
    "--global-batch-size=1",
    "--skip-train",
    "--no-save-optim",
    "--no-save-rng",
    "--ckpt-format=torch_dist",
    "--logging-level=30",
]


def make(froms: list[str], layers: list[str], save: Path, run: list[str], unverified: bool = False) -> str:
    """Makes the checkpoint and returns the description of its layers.

    Raises:
        ValueError: A mistake in the flags, or weights that do not fit.
    """
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise ValueError(f"--save {save} exists: give a new folder; nothing is overwritten.")
    from megatron_hybrid.checkpoint import warm_start_sources, weights
    from megatron_hybrid.cli import arguments

    asked, command = warm_start_sources.parse_layers(layers), flags.resolve(flags.with_mock_data(run))
    device, new = arguments.choose_device(command.device), command.pattern
    layout = f"--hybrid-layer-pattern={new.without_boundaries()}"
    args = arguments.parse([*command.argv, *ALONE, layout], device)
    olds = [warm_start_sources.open_old(folder, unverified) for folder in froms]
    intra = design(args) if new.counts()["P"] else None
    plan = warm_start_sources.complete(asked, new.layers, olds, intra)
    model = warm_start_sources.build(args, device)
    pieces = weights.stored_tensors(model)
    keys = {piece.key for piece in pieces}
    tensors = warm_start_sources.gather(plan, keys, olds, intra, (new.mtp, new.mtp_depths))
    warm_start_sources.check_shapes(tensors, pieces, olds[0].args, args)
    weights.fill(model, tensors)
    weights.save_weights(model, save)
    outer = sorted(key for key in keys - set(tensors) if not key.startswith("decoder.layers."))
    fresh = f"\nfresh: {', '.join(outer)}" if outer else ""
    told = warm_start_sources.describe(plan, new.layers, olds)
    return f"{told}{fresh}\nsaved to {save}: start the run with --load {save}"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = tool.parser(__doc__)
    parser.add_argument("--from", dest="froms", nargs="+", required=True, help="folders of trained checkpoints")
    parser.add_argument("--layers", nargs="+", default=[], help="NEW:BRANCH=OLD,BRANCH=OLD or NEW=OLD")
    parser.add_argument("--save", type=Path, required=True, help="folder to make")
    parser.add_argument("--load-unverified", action="store_true", help="also from checkpoints without a manifest")
    known = parser.parse_args(argv[:split])
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's messages are about a training that does not happen
        made = make(known.froms, known.layers, known.save, argv[split + 1 :], known.load_unverified)
    print(made)


if __name__ == "__main__":
    tool.run(main)
