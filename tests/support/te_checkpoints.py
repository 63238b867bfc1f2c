"""Builds models of both backends beside each other, in a process of its own, and says what they store.

    python -m tests.support.te_checkpoints OUT.json SCRATCH_FOLDER TRANSFORMER_ENGINE_FOLDER_OR_EMPTY

Transformer Engine is the real one from that folder or as installed, else the stand-in.
"""

import json
import sys
from pathlib import Path
from typing import Any

EVERY_SYMBOL = "M-*-W-P-MEGE"
PREDICTS_TWO_TOKENS = "M-*-/*-"
FLAGS = "--no-gradient-accumulation-fusion"  # needs Apex's compiled part


def main(out: str, scratch: str, folder: str) -> None:
    import importlib.util

    import torch

    from megatron_hybrid.cli import arguments
    from megatron_hybrid.patches import cpu, upstream
    from tests.golden import record_te_signatures as recorder
    from tests.support.ranks import read_help_once

    torch.set_num_threads(1)
    cpu.install()
    real = bool(folder) or importlib.util.find_spec("transformer_engine") is not None
    if real:
        te = recorder.import_transformer_engine(folder or None)
    else:
        from tests.support import te_stand_in

        te = te_stand_in.install()
    arguments.set_single_process_defaults()
    arguments.import_megatron_quietly()
    from megatron_hybrid.model.loss_head import HybridLossModel
    from megatron_hybrid.model.stack import HybridLayerStack

    upstream.prepare("cpu", HybridLayerStack, HybridLossModel)
    read_help_once()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    from megatron.core.extensions.transformer_engine import HAVE_TE

    models = {backend: build(backend, EVERY_SYMBOL) for backend in ("torch", "te")}
    mtp = {backend: build(backend, PREDICTS_TWO_TOKENS) for backend in ("torch", "te")}
    result: dict[str, Any] = {
        "real": real,
        "version": te.__version__,
        "have_te": HAVE_TE,
        "record": recorder.record() if real else None,
        "upstream_names": sorted(recorder.upstream_names()),
        "stored": {
            pattern: {backend: stored(model) for backend, model in pair.items()}
            for pattern, pair in ((EVERY_SYMBOL, models), (PREDICTS_TWO_TOKENS, mtp))
        },
        "classes": {name: type(module).__name__ for name, module in models["te"].named_modules()},
        "padded": {
            f"{name}, {'8 bits' if fp8 else 'bf16'}": padded(module, fp8)
            for name, module in models["te"].named_modules()
            if type(module).__name__ == "AlignedNormColumnLinear"
            for fp8 in (False, True)
        },
        "fuses_later": asks_for_weight_first() if real else None,
        "crossed": {
            "torch to te": cross(models["torch"], build("te", EVERY_SYMBOL), Path(scratch) / "torch"),
            "te to torch": cross(models["te"], build("torch", EVERY_SYMBOL), Path(scratch) / "te"),
        },
    }
    Path(out).write_text(json.dumps(result))


def build(backend: str, pattern: str) -> Any:
    """A model of one process, through the flags, the checks and upstream's builder."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron

    from megatron_hybrid.cli import arguments, flags
    from megatron_hybrid.model.build import model_config
    from tests.support.training import MOE, SIZES, STEPS, forget

    forget()
    # The CPU engine runs the torch backend alone; a model of the other can be built on it
    arguments.choose_backend = lambda asked, device: backend
    mtp = "--mtp-num-layers 1" if "/" in pattern else ""
    argv = f"{SIZES} {MOE if 'E' in pattern else ''} {STEPS} {mtp} {FLAGS} --hybrid-layer-pattern {pattern}".split()
    args = arguments.parse(flags.resolve(argv).argv, "cpu")
    initialize_megatron()
    config = model_config(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return config.get_builder_cls()(config).build_model(groups, pre_process=True, post_process=True)


def padded(linear: Any, fp8: bool) -> dict[str, Any]:
    """What the linear computes with: rows of its weight, and of that with zeros; whether gradients come back."""
    import torch

    linear.fp8, linear.may_fuse = fp8, True
    linear.weight.grad = None
    weight, _ = linear._get_weight_and_bias_tensors()
    rows = len(linear.weight)
    same = torch.equal(weight[:rows], linear.weight) and not weight[rows:].any()
    gradient = torch.arange(weight.numel(), dtype=weight.dtype).view_as(weight)
    weight.backward(gradient) if weight.grad_fn else None
    back = weight is linear.weight or torch.equal(linear.weight.grad, gradient[:rows])
    linear.fp8 = False
    return {"rows": rows, "padded": len(weight), "same": same, "back": back, "fused": linear.fuse_wgrad_accumulation}


def asks_for_weight_first() -> bool:
    """Whether LayerNormLinear reads how to compute gradients after it has asked for its weight."""
    import inspect

    from transformer_engine.pytorch import LayerNormLinear

    source = inspect.getsource(LayerNormLinear.forward)
    places = [source.index(word) for word in ("prepare_forward(", "_get_weight_and_bias_tensors(")]
    return places == sorted(places) and places[-1] < source.index("self.fuse_wgrad_accumulation")


def sharded(model: Any) -> dict[str, Any]:
    """What upstream's training loop would store (training/checkpointing.py, ``generate_state_dict``)."""
    from megatron.training import get_args
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    return model.sharded_state_dict(metadata=_build_sharded_state_dict_metadata(get_args()))


def parts(tree: Any) -> list[Any]:
    """The sharded tensors and objects of a sharded state dict."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    if isinstance(tree, ShardedTensorFactory):
        tree = tree.build()
    if isinstance(tree, ShardedTensor | ShardedObject):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree
    return [part for value in values for part in parts(value)]


def stored(model: Any) -> dict[str, Any]:
    """Key, kind, global shape, offset and dtype of everything in a checkpoint."""
    return {
        f"{part.key} @ {list(part.global_offset)}": [
            type(part).__name__,
            list(part.global_shape),
            str(getattr(part, "dtype", None)),
        ]
        for part in parts(sharded(model))
    }


def cross(saved: Any, loaded: Any, folder: Path) -> dict[str, Any]:
    """Saves one model and loads it into the other: the tensors that differ, or the error."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    def tensors(model: Any) -> dict[Any, Any]:
        found = [part for part in parts(sharded(model)) if isinstance(part, ShardedTensor)]
        return {(part.key, part.global_offset): part.data for part in found}

    folder.mkdir()
    for parameter in saved.parameters():
        parameter.data.normal_()
    dist_checkpointing.save(sharded(saved), str(folder))
    try:
        # strict: the default of --dist-ckpt-strictness
        state = dist_checkpointing.load(sharded(loaded), str(folder), strict="assume_ok_unexpected")
        loaded.load_state_dict(state, strict=True)
    except BaseException as error:  # torch's CheckpointException is no Exception
        return {"error": str(error).strip().splitlines()[-1]}
    ours, theirs = tensors(saved), tensors(loaded)
    differ = [str(key) for key in ours if key not in theirs or not torch.equal(ours[key], theirs[key])]
    return {"error": None, "differ": differ, "tensors": len(ours)}


if __name__ == "__main__":
    main(*sys.argv[1:])
