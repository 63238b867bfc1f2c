"""Layers with our kernels for norms and fusion, by Triton's interpreter, against the same layers without them."""

import pytest
import torch

from tests.support import block_runs

pytestmark = pytest.mark.triton_interpreter

NORM, SUM = "rms_norm_forward", "add_forward"
JOINT = "--intra-output joint --intra-norm group"


@pytest.mark.parametrize(
    ("symbol", "flags", "kernels"),
    [
        ("M", "", [NORM] * 2),  # of the input, and gated
        ("*", "", [NORM]),
        ("-", "", [NORM]),
        ("G", "", [NORM] * 2),
        ("P", "--intra-preset paper", [NORM] * 3),
        ("P", "--intra-preset hymba", [NORM, SUM]),
        ("P", f"--intra-scale scalar --intra-fusion diff {JOINT}", [NORM, SUM]),
        ("P", "--intra-scale vector --intra-fusion add --intra-norm none --intra-output joint", [NORM, SUM]),
        ("P", f"--intra-scale diff-lambda {JOINT}", [NORM, SUM]),
        ("P", f"--intra-fusion concat {JOINT} --intra-ssm-dim 48", [NORM] * 3),
        # groups of 8 and of 4 channels: no kernel for their difference
        ("P", f"--intra-fusion diff {JOINT} --intra-ssm-head-dim 4", [NORM]),
        ("P", "--intra-preset diff-transformer", [NORM]),
        ("P", f"--intra-scale gate --intra-fusion add {JOINT}", [NORM]),
    ],
)
def test_a_layer_is_the_one_of_torchs_operations(ranks, symbol, flags, kernels):
    case = {"symbol": symbol, "flags": flags, "length": 9}
    ((ours, ran),), ((theirs, none),) = (ranks(1).run(block_runs.layer, ours=way, **case) for way in (True, False))
    # RoPE of an attention branch writes its gradient there, too, either way
    assert [[name for name in names if name != "columns"] for names in (ran, none)] == [kernels, []]
    compare(ours, theirs)


ODD = "--mamba-num-heads 6 --mamba-head-dim 8 --intra-ssm-dim 48"


@pytest.mark.parametrize("symbol", ["M", "P"])
def test_the_scan_writes_its_gradient_into_that_of_a_padded_projection(ranks, symbol):
    case = {"symbol": symbol, "length": 9, "ours": True}
    ((ours, ran),) = ranks(1).run(block_runs.layer, flags=f"{ODD} --ssm-kernels triton", **case)
    ((theirs, plain),) = ranks(1).run(block_runs.layer, flags=f"{ODD} --ssm-kernels torch", **case)
    assert ran.count("columns") == plain.count("columns") + 1  # that of attention besides, either way
    compare(ours, theirs)


def compare(ours, theirs):
    for name in ("y", "dx"):
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=1e-5, atol=1e-5)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, found in ours["gradients"].items():
        torch.testing.assert_close(torch.tensor(found), torch.tensor(theirs["gradients"][name]), rtol=1e-4, atol=1e-4)
