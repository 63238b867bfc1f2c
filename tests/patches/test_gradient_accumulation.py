"""Gradients added inside the products that make them: the losses of a run that adds them afterwards."""

import pytest

from tests.model.test_layouts import CP2, DP, EP2, PP2, RTOL, SP, TP2
from tests.support.training import losses

PLAIN = "--no-gradient-accumulation-fusion"
ODD = "--mamba-num-heads 6 --mamba-head-dim 8 --intra-ssm-dim 48"
"""M, P project to 134 and 214 rows, which are padded."""


def kinds_of_gradients(pattern: str, flags: str) -> dict[str, set[bool]]:
    """After a step, for each kind of parameter: whether its gradient was added inside the product."""
    from tests.support.training import Run

    run = Run(pattern, flags)
    run.step()
    found: dict[str, set[bool]] = {}
    for chunk in run.model:
        for name, parameter in chunk.named_parameters():
            found.setdefault(name.split(".")[-2], set()).add(parameter.grad_added_to_main_grad)
    return found


@pytest.mark.parametrize(
    ("size", "pattern", "sizes", "layout"),
    [
        (1, "M-*P-W", ODD, DP),
        (1, "M-*P-W", ODD, f"{DP} --overlap-grad-reduce --micro-batch-size 2"),
        (1, "MEP-E", "", DP),
        (1, "M-*/P-", "", DP),  # tied weights of embedding, output layer and prediction head
        (2, "M-P|-*-/M-", "", f"{PP2} {DP}"),
        (2, "M-P-", ODD, f"{TP2} {SP} {DP}"),
        (2, "M-P-", f"{ODD} --mamba-num-groups 1 --intra-num-query-groups 1", f"{TP2} {DP}"),
        (2, "P-M-", "--untie-embeddings-and-output-weights", f"{CP2} {DP}"),
        (2, "MEPE", "", f"{EP2} {DP}"),
    ],
)
def test_losses_are_those_of_the_plain_path(ranks, reference, size, pattern, sizes, layout):
    where, _ = reference(pattern.replace("|", ""), sizes)
    run = {"pattern": pattern, "load": where}
    fused = ranks(size).run(losses, **run, flags=f"{sizes} {layout}")
    plain = ranks(size).run(losses, **run, flags=f"{sizes} {layout} {PLAIN}")
    for ours, theirs in zip(sum(fused, []), sum(plain, []), strict=True):
        assert ours == pytest.approx(theirs, rel=RTOL)


def test_which_gradients_are_added_inside_their_products(ranks):
    (found,) = ranks(1).run(kinds_of_gradients, pattern="M-*P-", flags=f"{ODD} {DP}")
    inside = {name for name, added in found.items() if added == {True}}
    assert inside == {"in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "word_embeddings"}
    assert all(added == {False} for name, added in found.items() if name not in inside)
    (plain,) = ranks(1).run(kinds_of_gradients, pattern="M-*P-", flags=f"{ODD} {DP} {PLAIN}")
    assert set().union(*plain.values()) == {False}
