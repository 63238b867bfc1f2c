"""What the one-process tests run beside Megatron: a model without a training, a layer on its own."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.support.training import MOE, SIZES, forget


def build(argv: list[str], on_meta: bool = False) -> tuple[Any, Namespace]:
    """The model of a command line for one process, without optimizer or data; and its arguments."""
    from contextlib import nullcontext

    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_hybrid.cli import arguments, flags
    from megatron_hybrid.model.build import model_config
    from megatron_hybrid.patches.meta import meta_device

    forget()
    args = arguments.parse(flags.resolve(argv).argv, "cpu", print_config=True)
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(args.seed)
    config = model_config(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with meta_device() if on_meta else nullcontext():
        return config.get_builder_cls()(config).build_model(groups, True, True), args


@contextmanager
def same_groups() -> Iterator[None]:
    """Lets many models of one process share Megatron's process groups: dozens, which take time and hold threads."""
    from megatron.core import mpu

    mpu.initialize_model_parallel()
    with patch.object(mpu, "initialize_model_parallel"), patch.object(mpu, "destroy_model_parallel"):
        yield


def layer(symbol: str, flags: str = "", length: int = 32, batch: int = 2) -> dict[str, Any]:
    """One layer of a model, forward and backward, all of its weights random.

    Args:
        symbol: A pattern of one layer.
        flags: Megatron's flags and ours, which win over the sizes in tests/support/training.py.
        length: Tokens; need not be the run's --seq-length.
        batch: Samples.

    Returns:
        fp32 arrays: ``x`` [length, batch, h], ``y`` of the same shape (the layer's output with its residual),
        ``dy``, ``dx``, and by parameter name ``weights``, ``gradients`` and ``buffers``.
    """
    import torch

    sizes = SIZES.replace("--use-rope-scaling", "") if "--position-embedding-type none" in flags else SIZES
    moe = MOE if symbol == "E" else ""
    train = "--micro-batch-size 1 --train-iters 1 --lr 1e-3"
    model, args = build(f"{sizes} {moe} {train} {flags} --hybrid-layer-pattern={symbol}".split())
    module = model.decoder.layers[0].train()
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() == 1:  # norms, biases, A, D: near what they start from, but no two alike
                p.add_(0.3 * random(*p.shape))
            else:
                p.copy_(random(*p.shape) * (0.5 if "conv" in name else p.shape[-1] ** -0.5))
        for name, b in module.named_buffers():
            if name.endswith("expert_bias"):
                b.copy_(0.3 * random(*b.shape))
    x = random(length, batch, args.hidden_size).requires_grad_()
    y = module(hidden_states=x, attention_mask=None)
    y = y[0] if isinstance(y, tuple) else y
    dy = random(*y.shape)
    names, weights = zip(*module.named_parameters(), strict=True)
    dx, *gradients = torch.autograd.grad(y, [x, *weights], dy)
    return {
        **{name: t.detach().numpy() for name, t in (("x", x), ("y", y), ("dy", dy), ("dx", dx))},
        "weights": {n: w.detach().numpy() for n, w in zip(names, weights, strict=True)},
        "gradients": {n: g.numpy() for n, g in zip(names, gradients, strict=True)},
        "buffers": {n: b.detach().numpy() for n, b in module.named_buffers()},
    }
