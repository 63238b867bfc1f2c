"""What the FLOPs tests run beside Megatron: torch's count of the products that a real model runs."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from tests.support.single import build, same_groups


def model_counts(argv: list[str], batch: int) -> dict[str, Any]:
    """A whole model on random tokens, attention written out as plain products.

    Returns:
        ``forward`` and ``backward``, FLOPs by operator (``mm``, ``bmm``, ``convolution`` ...), and ``sizes``, the
        :class:`megatron_hybrid.costs.Sizes` of the command line.
    """
    import torch

    torch.manual_seed(1)
    model, args = build(argv)
    length = args.seq_length
    tokens = torch.randint(0, args.vocab_size, (batch, length))
    positions = torch.arange(length).expand(batch, -1)
    return _count(lambda: model.train()(tokens, positions, None, labels=tokens).mean(), args)


def all_counts(layers: list[list[str]], models: list[list[str]], batch: int) -> list[dict[str, Any]]:
    """:func:`layer_counts` and :func:`model_counts` of many command lines, in order."""
    with same_groups():
        return [layer_counts(argv, batch) for argv in layers] + [model_counts(argv, batch) for argv in models]


def layer_counts(argv: list[str], batch: int) -> dict[str, Any]:
    """The only layer of a model, on random input; as :func:`model_counts`."""
    import torch

    torch.manual_seed(1)
    model, args = build(argv)
    x = torch.randn(args.seq_length, batch, args.hidden_size, requires_grad=True)

    def forward() -> Any:
        y = model.decoder.layers[0].train()(hidden_states=x, attention_mask=None)
        return (y[0] if isinstance(y, tuple) else y).mean()

    return _count(forward, args)


def _count(forward: Callable[[], Any], args: Any) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_hybrid.costs import sizes_of
    from megatron_hybrid.layers.attention import module

    ahead, back = FlopCounterMode(display=False), FlopCounterMode(display=False)
    # The counter takes the CPU's fused attention for nothing; the readable reference runs the same products.
    with patch.object(module, "attention", _written_out):
        with ahead:
            loss = forward()
        with back:
            loss.backward()
    return {"forward": _by_operator(ahead), "backward": _by_operator(back), "sizes": sizes_of(args)}


def _written_out(q: Any, k: Any, v: Any, scale: Any, window: Any, sinks: int, offset: int, _: float, documents: Any):
    from megatron_hybrid.kernels.attention import attention_reference

    return attention_reference(q, k, v, scale, window, sinks, offset, documents)


def _by_operator(counter: Any) -> dict[str, int]:
    return {str(op).removeprefix("aten."): int(n) for op, n in counter.get_flop_counts()["Global"].items()}
