"""The chunked SSD scan against the token-by-token recurrence in float64.

Errors are relative to the largest entry of the float64 tensor, since single entries may be small
by cancellation. Both sides get the same (already rounded) inputs.
"""

import inspect
import math

import pytest
import torch

from megatron_hybrid.kernels import combined, conv, ssd, ssd_chunks, ssm_backend, ssm_kernels

# fp32: the running sum of dt A over a chunk reaches 200 here, where half a unit in the last place
# is 8e-6; a decay is the exponential of a difference of two such sums, so 1.6e-5 is its relative
# error, and d_A adds terms that partly cancel. A wrong term shows at 1e-2 or more.
# bf16: everything inside is fp32; a bf16 result is rounded once, to half a unit, 2^-8 = 3.9e-3.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 4e-3}


def make_inputs(b, length, h, p, g, n, dtype=torch.float32, seed=0):
    """Random inputs of the scan; A, D, dt_bias and the state are fp32 in half precision too."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "x": normal(b, length, h, p),
        "dt": normal(b, length, h),
        "A": -normal(h, dtype=wide).exp(),
        "B": normal(b, length, g, n),
        "C": normal(b, length, g, n),
        "D": normal(h, dtype=wide),
        "z": normal(b, length, h, p),
        "dt_bias": normal(h, dtype=wide),
        "initial_states": normal(b, h, p, n, dtype=wide),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def outputs_and_gradients(scan, inputs, dtype=None, **options):
    """y, final states and the gradient of every input for fixed random output gradients."""
    if dtype is not None:
        inputs = {k: t.detach().to(dtype).requires_grad_() for k, t in inputs.items()}
    y, state = scan(**inputs, return_final_states=True, **options)
    gen = torch.Generator().manual_seed(1)
    # Rounded to bf16, so that every dtype is given the same gradients.
    dy, d_state = (torch.randn(t.shape, generator=gen).bfloat16() for t in (y, state))
    grads = torch.autograd.grad((y, state), tuple(inputs.values()), (dy.to(y.dtype), d_state.to(state.dtype)))
    return {"y": y, "state": state} | {f"d_{k}": t for k, t in zip(inputs, grads, strict=True)}


def assert_close(got, wanted, tolerance=None):
    """With no tolerance given, each tensor's dtype decides."""
    for name, want in wanted.items():
        limit = TOLERANCE[got[name].dtype] if tolerance is None else tolerance
        error = (got[name].double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= limit, f"{name}: relative error {error:.1e} > {limit:.0e}"


def documents(b, length, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (b, length), generator=gen).sort(1)[0].int()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 257])
def test_outputs_and_all_gradients(length, groups, dtype, packed, monkeypatch):
    inputs = make_inputs(2, length, 4, 8, groups, 16, dtype)
    options = {"dt_softplus": True, "seq_idx": documents(2, length) if packed else None}
    wanted = outputs_and_gradients(ssd.ssd_recurrence, inputs, torch.float64, **options)
    for chunk_size, budget in ((16, 1), (64, 2**19), (64, 1), (100, 2**19)):
        # A budget of one element makes every chunk its own segment.
        monkeypatch.setitem(ssd_chunks._SEGMENT_ELEMENTS, "cpu", budget)
        got = outputs_and_gradients(ssd.ssd_chunk_scan, inputs, chunk_size=chunk_size, **options)
        assert got["y"].dtype == dtype and got["state"].dtype == torch.float32
        assert_close(got, wanted)


def test_float64_agrees_to_rounding():
    inputs = make_inputs(2, 65, 6, 4, 3, 8, torch.float64)
    options = {"seq_idx": documents(2, 65), "dt_softplus": True, "dt_limit": (0.1, 1.5)}
    wanted = outputs_and_gradients(ssd.ssd_recurrence, inputs, **options)
    got = outputs_and_gradients(ssd.ssd_chunk_scan, inputs, chunk_size=16, **options)
    assert_close(got, wanted)


def test_skip_weight_per_channel_and_plain_steps():
    inputs = make_inputs(1, 40, 4, 8, 1, 8)
    inputs["D"] = torch.randn(4, 8, requires_grad=True)
    inputs["dt"] = torch.rand(1, 40, 4, requires_grad=True)
    wanted = outputs_and_gradients(ssd.ssd_recurrence, inputs, torch.float64)
    got = outputs_and_gradients(ssd.ssd_chunk_scan, inputs, chunk_size=16)
    assert_close(got, wanted)


def test_rows_of_a_strided_tensor_are_read_right():
    """The mixer passes slices of one wide projection, not contiguous tensors."""
    inputs = make_inputs(2, 50, 4, 8, 2, 16)
    wanted = ssd.ssd_chunk_scan(**inputs, chunk_size=16)
    for name in ("x", "dt", "B", "C", "z"):
        t = inputs[name].detach()
        inputs[name] = torch.cat([t, t], dim=-1)[..., : t.shape[-1]].transpose(0, 1).contiguous()
        inputs[name] = inputs[name].transpose(0, 1)
    assert torch.equal(ssd.ssd_chunk_scan(**inputs, chunk_size=16), wanted)


def test_packed_documents_equal_separate_runs():
    lengths = (5, 64, 1, 40, 17)
    inputs = make_inputs(1, sum(lengths), 4, 8, 2, 16)
    inputs.pop("initial_states")
    # Ids may come back: a new run is a new document.
    ids = torch.cat([torch.full((n,), i % 2) for i, n in enumerate(lengths)])[None].int()
    packed = ssd.ssd_chunk_scan(**inputs, chunk_size=16, seq_idx=ids)
    per_token = {k: t.split(lengths, dim=1) for k, t in inputs.items() if t.dim() > 2}
    rest = {k: t for k, t in inputs.items() if t.dim() == 1}
    alone = [
        ssd.ssd_chunk_scan(**{k: t[i] for k, t in per_token.items()}, **rest, chunk_size=16)
        for i in range(len(lengths))
    ]
    # Chunk boundaries fall elsewhere, so sums are in another order: fp32 rounding.
    assert_close({"y": packed}, {"y": torch.cat(alone, 1).double()}, 1e-5)


def test_no_gradient_crosses_a_document():
    inputs = make_inputs(1, 96, 4, 8, 1, 16)
    ids = (torch.arange(96) >= 41).int()[None]
    y = ssd.ssd_chunk_scan(**inputs, chunk_size=32, seq_idx=ids)
    names = ("x", "dt", "B", "C", "z")
    later = torch.autograd.grad(y[:, 41:].sum(), [inputs[k] for k in names], retain_graph=True)
    for name, grad in zip(names, later, strict=True):
        assert grad[:, :41].count_nonzero() == 0, name
        assert grad[:, 41:].count_nonzero() > 0, name
    (d_initial,) = torch.autograd.grad(y[:, 41:].sum(), inputs["initial_states"])
    assert d_initial.count_nonzero() == 0


def test_final_state_continues_the_sequence():
    inputs = make_inputs(2, 80, 4, 8, 2, 16)
    whole, end = ssd.ssd_chunk_scan(**inputs, chunk_size=32, return_final_states=True)
    parts, state = [], inputs.pop("initial_states")
    for piece in (slice(0, 33), slice(33, 80)):
        part = {k: t[:, piece] if t.dim() > 1 else t for k, t in inputs.items()}
        y, state = ssd.ssd_chunk_scan(**part, chunk_size=32, initial_states=state, return_final_states=True)
        parts.append(y)
    assert_close(
        {"y": torch.cat(parts, 1), "state": state},
        {"y": whole.double(), "state": end.double()},
    )


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30])
def test_strong_decay_stays_finite(scale):
    inputs = make_inputs(1, 2048, 2, 8, 1, 8)
    inputs["A"] = torch.tensor([-1.0, -scale], requires_grad=True)
    got = outputs_and_gradients(ssd.ssd_chunk_scan, inputs, chunk_size=256, dt_softplus=True)
    for name, tensor in got.items():
        assert tensor.isfinite().all(), name


def test_one_enormous_step_does_not_swallow_the_small_ones():
    """Without a bound the running sum would be -1e9, where fp32 steps are 64 apart."""
    inputs = make_inputs(1, 64, 2, 4, 1, 8)
    step = torch.full((1, 64, 2), 0.01)
    step[:, 10] = 1e9
    inputs["dt"] = step.requires_grad_()
    inputs["A"] = torch.tensor([-1.0, -2.0], requires_grad=True)
    inputs.pop("dt_bias")
    # x is multiplied by dt, so the enormous token is silenced to keep the others visible.
    inputs["x"] = inputs["x"].detach() * (torch.arange(64) != 10).view(1, 64, 1, 1)
    wanted = ssd.ssd_recurrence(**{k: t.detach().double() for k, t in inputs.items()})
    got = ssd.ssd_chunk_scan(**inputs, chunk_size=64)
    # The sum passes -87, where fp32 steps are 2^-17 = 8e-6 of absolute decay exponent.
    assert_close({"y": got}, {"y": wanted}, 5e-5)


def test_gradient_of_decay_is_exact_where_decay_is_strong():
    """A path over no step adds nothing to dA, not even a rounding error of a large number."""
    inputs = make_inputs(1, 64, 1, 8, 1, 8)
    inputs["dt"] = torch.full((1, 64, 1), 12.0, requires_grad=True)
    inputs["A"] = torch.tensor([-1.0], requires_grad=True)
    inputs.pop("dt_bias")
    wanted = outputs_and_gradients(ssd.ssd_recurrence, inputs, torch.float64)
    got = outputs_and_gradients(ssd.ssd_chunk_scan, inputs, chunk_size=64)
    # exp(-12) of neighbours' terms is all of dA; the exponent 12 k <= 768 rounds to 3e-5.
    assert_close({"d_A": got["d_A"]}, {"d_A": wanted["d_A"]}, 1e-4)


def test_traces_without_a_graph_break():
    inputs = make_inputs(1, 40, 2, 4, 1, 8)
    compiled = torch.compile(ssd.ssd_chunk_scan, backend="aot_eager", fullgraph=True)
    wanted = outputs_and_gradients(ssd.ssd_recurrence, inputs, torch.float64)
    got = outputs_and_gradients(compiled, inputs, chunk_size=16)
    assert_close(got, wanted)


@pytest.mark.parametrize("norm", [False, True])
def test_split_conv1d_scan_equals_its_parts(norm):
    b, length, h, p, g, n = 2, 37, 4, 8, 2, 16
    inner, wide = h * p, h * p + 2 * g * n
    gen = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    zxbcdt, weight, bias = normal(b, length, inner + wide + h), normal(wide, 4), normal(wide)
    dt_bias, A, D = normal(h), normal(h), normal(h, p)
    scale, out = normal(inner), normal(5, inner)
    A, ids = -A.exp(), documents(b, length)
    got, state = combined.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, 16, seq_idx=ids, ngroups=g, return_final_states=True,
        rmsnorm_weight=scale if norm else None, outproj_weight=out, norm_before_gate=False,
    )  # fmt: skip
    z, xBC, dt = zxbcdt.split([inner, wide, h], -1)
    xBC = conv.causal_conv1d_reference(xBC.mT, weight, bias, ids, activation="silu").mT
    x, B, C = xBC.split([inner, g * n, g * n], -1)
    y, wanted_state = ssd.ssd_recurrence(
        x.reshape(b, length, h, p), dt, A, B.reshape(b, length, g, n), C.reshape(b, length, g, n),
        D, dt_bias=dt_bias, dt_softplus=True, seq_idx=ids, return_final_states=True,
    )  # fmt: skip
    y = y.flatten(-2) * torch.nn.functional.silu(z)
    if norm:
        rows = y.view(b, length, g, -1)
        y = (rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2) * scale
    assert_close({"y": got, "s": state}, {"y": y @ out.T, "s": wanted_state}, 1e-12)


def test_mistakes_are_named():
    inputs = make_inputs(1, 8, 4, 2, 2, 4)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ssd.ssd_chunk_scan(**inputs, chunk_size=0)
    with pytest.raises(ValueError, match="4 heads do not divide into 3 groups"):
        bad = torch.zeros(1, 8, 3, 4)
        ssd.ssd_chunk_scan(**(inputs | {"B": bad, "C": bad}), chunk_size=4)
    with pytest.raises(ValueError, match="seq_idx has shape"):
        ssd.ssd_chunk_scan(**inputs, chunk_size=4, seq_idx=torch.zeros(8))
    with pytest.raises(ValueError, match="cu_seqlens"):
        combined.mamba_chunk_scan_combined(**inputs, chunk_size=4, return_varlen_states=True)
    with pytest.raises(TypeError, match="state_dtype"):
        combined.mamba_chunk_scan_combined(**inputs, chunk_size=4, state_dtype=torch.float32)
    with pytest.raises(ValueError, match="pass headdim"):
        combined.mamba_split_conv1d_scan_combined(
            torch.zeros(1, 8, 10), torch.zeros(4, 4), None, *torch.zeros(3, 2), chunk_size=4
        )


def test_backend_is_chosen_by_device():
    assert ssm_backend("cpu") == "torch"
    kernels = ssm_kernels("cpu")
    assert kernels.chunk_scan is combined.mamba_chunk_scan_combined
    with pytest.raises(ValueError, match="mamba_ssm needs a CUDA device, not cpu; use torch"):
        ssm_kernels("cpu", "mamba_ssm")
    with pytest.raises(ValueError, match="triton needs a CUDA device"):
        ssm_backend("cpu", "triton")
    with pytest.raises(ValueError, match="'cuda' are unknown; choose from triton, mamba_ssm, torch"):
        ssm_backend("cuda", "cuda")


def test_backend_is_chosen_by_what_is_installed(monkeypatch):
    installed = {"triton"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert ssm_backend("cuda") == "triton"
    with pytest.raises(ValueError, match="mamba_ssm needs mamba_ssm and causal_conv1d, not installed"):
        ssm_backend("cuda", "mamba_ssm")
    installed |= {"mamba_ssm", "causal_conv1d"}
    assert ssm_backend("cuda", "mamba_ssm") == "mamba_ssm"
    assert ssm_backend("cuda") == "triton"
    installed.clear()
    assert ssm_backend("cuda") == "torch"


def test_signature_covers_mamba_ssm_defaults():
    """mamba_ssm 2.3 ops/triton/ssd_combined.py: same names, same defaults."""
    parameters = inspect.signature(combined.mamba_split_conv1d_scan_combined).parameters
    defaults = {k: v.default for k, v in parameters.items() if v.default is not v.empty}
    assert defaults == {
        "initial_states": None,
        "seq_idx": None,
        "dt_limit": (0.0, math.inf),
        "return_final_states": False,
        "activation": "silu",
        "rmsnorm_weight": None,
        "rmsnorm_eps": 1e-6,
        "outproj_weight": None,
        "outproj_bias": None,
        "headdim": None,
        "ngroups": 1,
        "norm_before_gate": True,
    }
