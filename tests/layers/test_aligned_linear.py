"""Padded products: the function, the gradients and the checkpoints of upstream's column-parallel linear."""

from typing import Any

import pytest

# What the ranks run ---------------------------------------------------------------------------------


def both_linears(rows: int, sequence_parallel: bool, fused: bool, bias: bool = False) -> dict[str, Any]:
    """Outputs and gradients of two steps of upstream's linear and of ours, whose weight has ``rows`` rows a rank.

    Returns:
        For each name of a tensor, the pair; ``columns``, those of the product; ``shapes`` of parameters, sharded state.
    """
    import torch
    from megatron.core import mpu
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_hybrid.layers.aligned_linear import AlignedColumnLinear
    from tests.support.training import forget

    forget()
    tp = torch.distributed.get_world_size()
    mpu.initialize_model_parallel(tp)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=fused,
    )
    made = {"config": config, "init_method": torch.nn.init.normal_, "bias": bias, "gather_output": False}
    linears = [kind(16, rows * tp, **made) for kind in (ColumnParallelLinear, AlignedColumnLinear)]
    linears[1].load_state_dict(linears[0].state_dict())
    seen: list[int] = []
    found: dict[str, Any] = {}
    for linear in linears:
        if fused:  # as DDP gives it
            linear.weight.main_grad, linear.weight.grad_added_to_main_grad = torch.ones_like(linear.weight), False
        torch.manual_seed(2)
        for step in range(2):
            x = torch.randn(6, 2, 16, requires_grad=True)
            y, _ = linear(x)
            seen.append(y.untyped_storage().nbytes() // 4 // (12 * (tp if sequence_parallel else 1)))
            linear.weight.grad = None
            y.backward(torch.randn_like(y))
            tensors = {"y": y, "dx": x.grad, "dw": linear.weight.main_grad if fused else linear.weight.grad}
            if bias:
                tensors["db"] = linear.bias.grad
            for name, tensor in tensors.items():
                found.setdefault(f"{name}{step}", []).append(tensor.detach().clone())
        if fused:
            assert linear.weight.grad_added_to_main_grad and linear.weight.grad.shape == linear.weight.shape
    groups = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    state = linears[1].sharded_state_dict(metadata=groups)
    shapes = [linears[1].weight.shape, state["weight"].local_shape]
    return {"tensors": found, "columns": seen, "shapes": [tuple(shape) for shape in shapes]}


def tied_twice() -> tuple[Any, Any]:
    """main_grad of a marked weight (upstream's ``zero_out_wgrad``) with a second gradient, and what it should be."""
    import torch

    from megatron_hybrid.layers.aligned_linear import PadRows

    weight = torch.nn.Parameter(torch.randn(5, 4))
    weight.zero_out_wgrad, weight.grad_added_to_main_grad = True, False
    padded = PadRows.apply(weight, 8, True)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Any) -> Any:
            return w.sum()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> None:
            return None

    (Product.apply(padded) + (3 * weight).sum()).backward()
    return weight.grad, torch.full((5, 4), 3.0)


# Tests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "sequence_parallel", "fused"),
    [(1, False, False), (1, False, True), (2, False, True), (2, True, False), (2, True, True)],
)
def test_equals_the_linear_without_padding(ranks, size, sequence_parallel, fused):
    import torch

    for found in ranks(size).run(both_linears, rows=13, sequence_parallel=sequence_parallel, fused=fused):
        assert found["columns"] == [13, 13, 16, 16]
        assert found["shapes"] == [(13, 16)] * 2
        for name, (theirs, ours) in found["tensors"].items():
            # The padding adds exact zeros. The CPU's products of another width may sum in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)


def test_a_bias_is_padded_too(ranks):
    import torch

    (found,) = ranks(1).run(both_linears, rows=13, sequence_parallel=False, fused=False, bias=True)
    assert found["columns"] == [13, 13, 16, 16]
    for theirs, ours in found["tensors"].values():
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_aligned_rows_are_upstreams_product(ranks):
    import torch

    (found,) = ranks(1).run(both_linears, rows=24, sequence_parallel=False, fused=True)
    assert found["columns"] == [24] * 4
    assert all(torch.equal(theirs, ours) for theirs, ours in found["tensors"].values())


def test_a_weight_with_another_gradient_gets_that_beside_zeros(ranks):
    import torch

    ((found, wanted),) = ranks(1).run(tied_twice)
    assert torch.equal(found, wanted)
