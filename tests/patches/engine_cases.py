"""What test_engine.py runs in the ranks, and, as a program, in a process where nothing is installed yet."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from tests.support.training import EOD, MOE, SIZES, STEPS, Run, forget


def main() -> None:
    """Prints as JSON what the CPU engine finds and does in a fresh process."""
    import torch
    from torch.overrides import _get_current_function_mode_stack

    from megatron_hybrid.patches import cpu

    result: dict[str, Any] = {"before": cpu.is_active()}
    result["missing"] = [name for owner, name, _, _ in cpu.REPLACED if not hasattr(owner, name)]
    result["without reason"] = [name for _, name, _, reason in cpu.REPLACED if len(reason) < 5]
    rows = [(str(owner), name) for owner, name, _, _ in cpu.REPLACED]
    result["twice in the table"] = [row for row in set(rows) if rows.count(row) > 1]

    is_initialized, to_cuda = torch.cuda.is_initialized, torch.Tensor.cuda
    torch.cuda.is_initialized = lambda: True
    try:
        cpu.install()
        result["initialised"] = "accepted"
    except RuntimeError as error:
        result["initialised"] = str(error)
    result["untouched after refusal"] = torch.Tensor.cuda is to_cuda and not cpu.is_active()
    torch.cuda.is_initialized = is_initialized

    cpu.install()
    cpu.install()
    result["after"] = cpu.is_active()
    result["modes"] = len(_get_current_function_mode_stack())
    result["not replaced"] = [name for owner, name, new, _ in cpu.REPLACED if getattr(owner, name) is not new]
    print(json.dumps(result))


# The CPU engine --------------------------------------------------------------------------------------


def devices() -> dict[str, str]:
    """Where tensors land that are asked for on "cuda", by the way of asking."""
    import torch

    x = torch.ones(2)
    with torch.device("cuda"):
        in_context = torch.zeros(2)
    made = {
        "factory": torch.empty(2, device="cuda"),
        "index": torch.empty(2, device="cuda:0"),
        "object": torch.tensor([1.0], device=torch.device("cuda")),
        "object with index": torch.arange(3, device=torch.device("cuda", 0)),
        "current_device": torch.zeros(2, device=torch.cuda.current_device()),
        "context": in_context,
        "like": torch.zeros_like(x, device="cuda"),
        "new": x.new_empty(3, device="cuda"),
        "to": x.to("cuda"),
        "to keyword": x.to(device="cuda", dtype=torch.float64),
        "to object": x.to(torch.device("cuda"), non_blocking=True),
        "cuda": x.cuda(),
        "cuda with arguments": x.cuda(0, non_blocking=True),
        "module": torch.nn.Linear(2, 2, device="cuda").weight,
        "module.cuda": torch.nn.Linear(2, 2).cuda().weight,
        "module.to": torch.nn.Linear(2, 2).to("cuda").weight,
        "pin_memory": x.pin_memory(),
        "pin_memory keyword": torch.empty(2, pin_memory=True),
    }
    return {way: tensor.device.type for way, tensor in made.items()}


def imitations() -> dict[str, Any]:
    """Events, streams and type names."""
    import time

    import torch

    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    time.sleep(0.02)
    second.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_event(torch.cuda.Stream().record_event())
    torch.cuda.synchronize()
    x = torch.zeros(2)
    return {
        "milliseconds": first.elapsed_time(second),
        "types": [x.type(), x.bfloat16().type(), torch.nn.Parameter(x.half()).type()],
        "converted": str(x.type(torch.float64).dtype),
        "cuda": torch.cuda.is_available(),
        "accelerator": torch.accelerator.is_available(),
    }


def random_streams() -> dict[str, bool]:
    """The host's and the device's random states: what changes which."""
    import torch

    def states() -> tuple[Any, Any]:
        return torch.get_rng_state().clone(), torch.cuda.get_rng_state().clone()

    def changed(action: Any) -> tuple[bool, bool]:
        torch.manual_seed(1)
        host, device = states()
        action()
        return not torch.equal(torch.get_rng_state(), host), not torch.equal(torch.cuda.get_rng_state(), device)

    torch.manual_seed(5)
    other = states()
    data = torch.utils.data.DataLoader([torch.zeros(1)] * 4, batch_size=2, shuffle=True)
    torch.manual_seed(1)
    drawn = torch.rand(3, device="cuda")
    torch.manual_seed(1)
    repeats = torch.equal(torch.rand(3), drawn)
    return {
        "manual_seed sets both": changed(lambda: torch.manual_seed(2)) == (True, True),
        "manual_seed repeats": repeats,
        "cuda.manual_seed sets the device": changed(lambda: torch.cuda.manual_seed(2)) == (False, True),
        "cuda.manual_seed_all too": changed(lambda: torch.cuda.manual_seed_all(2)) == (False, True),
        "draws move the device": changed(lambda: torch.rand(3)) == (False, True),
        "set_rng_state sets the host": changed(lambda: torch.set_rng_state(other[0])) == (True, False),
        "cuda.set_rng_state sets the device": changed(lambda: torch.cuda.set_rng_state(other[1])) == (False, True),
        "a data loader draws on the host": changed(lambda: list(data)) == (True, False),
        "and without shuffling": changed(lambda: iter(torch.utils.data.DataLoader([1, 2]))) == (True, False),
    }


def tracker() -> dict[str, bool]:
    """Megatron's forked random states on the CPU engine."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    Run("M-", "--no-load-optim")  # process groups
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    host, device = torch.get_rng_state().clone(), torch.cuda.get_rng_state().clone()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(4)
    restored = torch.equal(torch.get_rng_state(), host) and torch.equal(torch.cuda.get_rng_state(), device)
    with get_cuda_rng_tracker().fork():
        second = torch.rand(4)
    plain = torch.rand(4)
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    with get_cuda_rng_tracker().fork():
        again = torch.rand(4)
    return {
        "both states are restored": restored,
        "a fork goes on where it stopped": not torch.equal(first, second),
        "the fork is a stream of its own": not torch.equal(first, plain),
        "the seed repeats it": torch.equal(first, again),
    }


# Reaches into Megatron -------------------------------------------------------------------------------


def upstream_patterns(pattern: str) -> dict[str, Any]:
    """What upstream's own functions make of a pattern with our symbols."""
    from megatron.core.models.hybrid import hybrid_layer_allocation as allocation

    parsed = allocation.parse_hybrid_pattern(pattern)
    return {
        "main": parsed.main_pattern,
        "mtp": parsed.mtp_pattern,
        "depths": parsed.mtp_num_depths,
        "layers": allocation.get_hybrid_total_layer_count(pattern),
        "counts": allocation.get_hybrid_layer_counts(pattern),
        "symbols": allocation.Symbols.name_sorted_valid_layer_symbols(),
    }


def helpers() -> list[str]:
    """Calls what Megatron calls to compile the dataset helpers; names that the compiled module has."""
    from megatron.core.datasets import helpers_cpp
    from megatron.core.datasets.utils import compile_helpers

    if compile_helpers() is not None:
        raise ValueError("compile_helpers gave a result")
    return dir(helpers_cpp)


def mtp_and_delta_net() -> dict[str, Any]:
    """One step of a model with a gated delta net and a multi-token-prediction head."""
    from megatron.core.utils import unwrap_model

    run = Run("G-M-*-/M-", "--mtp-num-layers 1 --use-distributed-optimizer")
    before = run.parameters()
    loss, norm = run.step()
    after = run.parameters()
    head = unwrap_model(run.model[0]).mtp.layers[0].mtp_model_layer
    inner = getattr(run.optimizer, "chained_optimizers", [run.optimizer])[0].optimizer
    return {
        "head": f"{type(head).__module__}.{type(head).__name__}",
        "layers": len(head.layers),
        "loss": loss,
        "norm": norm,
        "unmoved": [name for name in before if (before[name] == after[name]).all()],
        "optimizer": f"{type(inner).__module__}.{type(inner).__name__}",
        "steps": [group["step"] for group in inner.param_groups],
        "state": sorted({name for state in inner.state.values() for name in state}),
    }


def mamba_names() -> dict[str, Any]:
    """Whether upstream's mixer has our kernels, and the error when a name is gone."""
    import torch
    from megatron.core.ssm import mamba_mixer

    from megatron_hybrid.kernels import ssm_kernels
    from megatron_hybrid.patches import upstream

    ours = ssm_kernels("cpu", "torch")
    kept = mamba_mixer.MAMBA_HAS_STATE_DTYPE
    del mamba_mixer.MAMBA_HAS_STATE_DTYPE
    try:
        upstream.use_torch_mamba_kernels()
        error = "none"
    except RuntimeError as e:
        error = str(e)
    mamba_mixer.MAMBA_HAS_STATE_DTYPE = kept
    upstream.use_torch_mamba_kernels()
    return {
        "combined": mamba_mixer.mamba_split_conv1d_scan_combined is ours.split_conv1d_scan,
        "scan": mamba_mixer.mamba_chunk_scan_combined is ours.chunk_scan,
        "conv": mamba_mixer.causal_conv1d_fn is ours.causal_conv1d,
        "norm": issubclass(mamba_mixer.ExtendedRMSNorm, torch.nn.Module),
        "error": error,
    }


def uneven(sizes: list[int]) -> dict[str, bool]:
    """Gathers and reduce-scatters of unequal parts on two ranks against the obvious results."""
    import torch
    from megatron.core.tensor_parallel import mappings

    group = torch.distributed.group.WORLD
    rank = group.rank()
    whole = torch.arange(4.0 * sum(sizes)).reshape(-1, 4)
    weights = [torch.full_like(whole, 2.0) + i * whole for i in range(2)]
    part = whole.split(sizes)[rank].clone().requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(part, group=group, output_split_sizes=sizes)
    (gathered * weights[rank]).sum().backward()
    full = weights[rank].clone().requires_grad_()
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(full, group=group, input_split_sizes=sizes)
    (scattered * (1.0 + rank)).sum().backward()
    factors = torch.cat([torch.full((n, 4), 1.0 + i) for i, n in enumerate(sizes)])
    return {
        "gathered": torch.equal(gathered, whole),
        "its gradient": torch.equal(part.grad, sum(weights).split(sizes)[rank]),
        "scattered": torch.equal(scattered, sum(weights).split(sizes)[rank]),
        "its gradient too": torch.equal(full.grad, factors),
        "the input is kept": torch.equal(full.detach(), weights[rank]),
    }


def exchange() -> dict[str, Any]:
    """The dispatcher's splits, and an all-to-all with them on two ranks: rank r sends r + 1 rows to rank 0."""
    import torch
    from megatron.core.tensor_parallel import all_to_all
    from megatron.core.transformer.moe import token_dispatcher

    rank = torch.distributed.get_rank()
    sent = torch.tensor([rank + 1, 3])
    received = torch.tensor([1, 2] if rank == 0 else [3, 3])
    to_cpu = token_dispatcher.maybe_move_tensor_to_cpu
    splits = [to_cpu(t, as_numpy=True) for t in (received, sent)]
    x = (100.0 * rank + torch.arange(float(sent.sum()))).requires_grad_()
    y = all_to_all(torch.distributed.group.WORLD, x, *splits)
    (y * (rank + 1)).sum().backward()
    return {
        "kinds": [type(s).__name__ for s in splits],
        "untouched": to_cpu(received) is received and to_cpu(None, as_numpy=True) is None,
        "y": y.tolist(),
        "gradient": x.grad.tolist(),
    }


def flops(pattern: str) -> tuple[float, float]:
    """What Megatron counts for a step of 4 samples, and what costs.py does."""
    from functools import partial

    from megatron.training import training

    from megatron_hybrid import costs
    from megatron_hybrid import pattern as language
    from megatron_hybrid.training.micro_batches import count_flops_with

    args = Run(pattern).args
    layers, sizes = language.parse(pattern), costs.sizes_of(args)
    kept = training.num_floating_point_operations
    count_flops_with(partial(costs.training_flops, layers, sizes))
    counted = training.num_floating_point_operations(
        args, 4, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None
    )
    training.num_floating_point_operations = kept
    return counted, costs.training_flops(layers, sizes, 4)


def on_meta(pattern: str) -> dict[str, Any]:
    """A model built on the meta device: devices of its parameters, their number, and the number expected."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron

    from megatron_hybrid import costs
    from megatron_hybrid import pattern as language
    from megatron_hybrid.cli import arguments, flags
    from megatron_hybrid.model.build import model_config
    from megatron_hybrid.patches.meta import meta_device

    forget()
    argv = f"{SIZES} {MOE if 'E' in pattern else ''} {STEPS} --hybrid-layer-pattern {pattern}".split()
    args = arguments.parse(flags.resolve(argv).argv, "cpu")
    initialize_megatron()
    config = model_config(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with meta_device():
        model = config.get_builder_cls()(config).build_model(groups, pre_process=True, post_process=True)
    return {
        "devices": sorted({p.device.type for p in model.parameters()}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "expected": costs.model_parameters(language.parse(pattern), costs.sizes_of(args)).total,
        "afterwards": [torch.empty(1).device.type, torch.device(torch.cuda.current_device()).type],
    }


def batch(pattern: str, flags: str, eod_at: tuple[int, ...] = ()) -> dict[str, Any]:
    """What next_batch gives this rank of one sample: tokens t, labels t + 1, a mask that is 0 at each third token.

    Documents end at the positions ``eod_at``.
    """
    import torch

    import pretrain_hybrid
    from megatron_hybrid.training.micro_batches import next_batch

    run = Run(pattern, flags)
    length = run.args.seq_length
    tokens = torch.arange(length)[None]
    tokens[:, list(eod_at)] = EOD
    mask = (tokens % 3 != 0).float()
    sample = {"tokens": tokens, "labels": tokens + 1, "loss_mask": mask, "position_ids": tokens.clone()}
    reads = pretrain_hybrid.reads_data(None)
    found = next_batch(iter([sample]) if reads else None, run.model[0])
    return {name: value if value is None else value.tolist() for name, value in found.items()}


# The command line ------------------------------------------------------------------------------------


def program(line: str, sizes: bool = True, mock: bool = True) -> tuple[int, str, str]:
    """Runs the program's main() with flags that end it before the training.

    Args:
        line: The flags.
        sizes: Behind those of tests/support/training.py.
        mock: With ``--mock-data``, when behind those.

    Returns:
        Exit code, output and errors.
    """
    import sys

    import pretrain_hybrid

    forget()
    pretrain_hybrid.PATIENCE_S = 0.0
    before = f"{SIZES} {STEPS}" if mock else f"{SIZES} {STEPS}".replace("--mock-data", "")
    argv, kept = f"{before if sizes else ''} {line}".split(), sys.argv
    out, errors = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            pretrain_hybrid.main(argv)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.argv = kept
    return code, out.getvalue(), errors.getvalue()


def check_checkpoint(load: str, pattern: str) -> str:
    """The error of loading a checkpoint with another pattern, or nothing."""
    from argparse import Namespace

    from megatron_hybrid.cli import arguments
    from megatron_hybrid.run_folder.checkpoints import checkpoints

    found = checkpoints(Path(load))
    folder = str(found[0].folder) if found else None
    args = Namespace(checkpoint=folder, hybrid_layer_pattern=pattern, padded_vocab_size=None, rank=0)
    args.notes, args.allow_changed, args.skip_train, args.ckpt_format = [], [], True, "torch_dist"
    try:
        arguments.check_checkpoint(args)
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
