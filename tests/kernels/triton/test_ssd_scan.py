"""The Triton scan against the float64 one, on the CPU by Triton's interpreter."""

import pytest
import torch

from megatron_hybrid.kernels.triton import configs
from megatron_hybrid.kernels.triton import ssd_scan as scan
from tests.support.scan_cases import assert_close, rounded, scan_results

pytestmark = pytest.mark.triton_interpreter

OPTIONS = {
    "plain": {},
    "no-gate-no-D": {"z": False, "D": False},
    "initial": {"initial": True},
    "documents": {"packed": True},
    "documents-initial": {"packed": True, "initial": True},
    "no-softplus": {"softplus": False},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 64, 129])
def test_outputs_and_all_gradients(length, dtype, case):
    assert_close(scan_results(2, length, 2, 16, 1, 16, dtype, **OPTIONS[case]), dtype)


# heads, head dim, groups, state: several groups, sizes that are no powers of two, several blocks of a head's channels
@pytest.mark.parametrize(("h", "p", "g", "n"), [(4, 16, 2, 24), (1, 48, 1, 40), (3, 40, 3, 8), (2, 96, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_heads_and_states(h, p, g, n, dtype, monkeypatch):
    for key in list(configs.TABLE):
        if key[0].startswith("scan"):
            monkeypatch.setitem(configs.TABLE, key, {**configs.TABLE[key], "CHANNELS": 32})
    assert_close(scan_results(1, 70, h, p, g, n, dtype, packed=True, initial=True), dtype)


@pytest.mark.parametrize("programs", [1, 512])
def test_heads_of_a_group_split_over_programs(programs, monkeypatch):
    """Few programs: each has all heads of a group; many: each has one."""
    for key in list(configs.TABLE):
        if "PROGRAMS" in configs.TABLE[key]:
            monkeypatch.setitem(configs.TABLE, key, {**configs.TABLE[key], "PROGRAMS": programs})
    assert_close(scan_results(1, 65, 4, 16, 1, 16, torch.float32, packed=True), torch.float32)


@pytest.mark.parametrize("case", [{}, {"packed": True, "initial": True}])
def test_long_sequences_of_few_heads_are_cut_into_segments(case):
    assert_close(scan_results(1, 1100, 1, 16, 1, 16, torch.float32, **case), torch.float32)


def test_an_enormous_step_leaves_later_ones_their_precision():
    """dt A is clamped: behind a step of 1e4, differences of the running sum still have the small steps in them."""
    x, B, C = (rounded(1, 64, 16, dtype=torch.float32, seed=i) for i in range(3))
    raw = torch.full((1, 64, 1), 0.01)
    x[:, 10], raw[:, 10] = 0.0, 1e4  # forgets all before it, and writes nothing

    def run(first: int) -> torch.Tensor:
        rows = slice(first, None)
        made = scan.Scan(
            x[:, rows], None, B[:, rows], C[:, rows], raw[:, rows], None, -torch.ones(1), None, None, None, 16, 1,
            softplus=False,
        )  # fmt: skip
        out = torch.empty_like(made.x)
        scan.forward(made, out)
        return out

    alone, behind = run(11), run(0)[:, 11:]
    # The sum is 87, half a unit 4e-6, and 53 steps are added to it. Not clamped, half a unit would be 5e-4.
    assert (behind - alone).abs().max() <= 2e-4 * alone.abs().max()


def test_refused():
    t = torch.zeros(1, 4, 16)
    made = scan.Scan(t.double(), None, t, t, t[..., :1], None, -torch.ones(1), None, None, None, 16, 1)
    with pytest.raises(ValueError, match="not torch.float64.*--ssm-kernels torch"):
        scan.forward(made, t)
    made = made._replace(x=torch.zeros(1, 16, 4).transpose(1, 2))
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        scan.forward(made, t)
