"""A step's time, by hand."""

import dataclasses
import math

import pytest

from megatron_hybrid import costs
from megatron_hybrid.accounting.activation_settings import Recompute
from megatron_hybrid.accounting.tensors import weights
from megatron_hybrid.accounting.traffic import CommunicationSettings
from megatron_hybrid.costs.parameters import layer_linears
from megatron_hybrid.plan.figures import times
from megatron_hybrid.plan.time import EIGHT_BIT_EFFICIENCY, recomputed_flops, spans, step_time
from tests.plan.support import machine, silent, small


def seconds(s, m, stage=0):
    """Forward and backward seconds of a micro-batch in a stage of one segment, nothing recomputed."""
    work = costs.stage_work(s.pattern, s.sizes, s.layout.pp)[stage]
    tokens = s.layout.micro_batch * s.sizes.seq_length / (s.layout.tp * s.layout.cp)
    return work * tokens / (m.peak * m.efficiency), 2 * work * tokens / (m.peak * m.efficiency)


@pytest.mark.parametrize("pattern", ["M-*-", "WMPG-*E/ME/ME"])
def test_one_gpu_computes_and_steps(pattern):
    s, m = small(pattern, "--num-experts 6" if "E" in pattern else "", 1), machine()
    step = step_time(s, m)
    flops = costs.training_flops(s.pattern, s.sizes, s.layout.global_batch)
    held = costs.rank_memory(s.pattern, s.sizes, s.layout, costs.Storage.from_args(s.args), 0)
    assert step.compute == pytest.approx(flops / (989e12 * 0.40), rel=1e-9)
    assert step.pipeline == pytest.approx(step.compute, rel=1e-9)
    assert step.optimizer == (2 * held.optimizer + held.gradients + held.parameters) / 3350e9
    assert step.data == step.messages == 0 and step.bubble == pytest.approx(0, abs=1e-9)
    assert step.total == step.pipeline + step.data + step.optimizer
    found = times(s, m)
    assert found["mfu"] == pytest.approx(0.40 * step.compute / step.total, rel=1e-9)
    assert found["tokens_per_second"] == 48 * 512 / found["step"]


EIGHT_BITS = "--backend te --fp8-format hybrid --fp8-recipe tensorwise --mamba-num-heads 16"


@pytest.mark.parametrize("pattern", ["M-*-", "M-*-/M-"])
@pytest.mark.parametrize("recompute", [None, "uniform"])
def test_linear_layers_are_faster_in_8_bits(pattern, recompute):
    """All of them but the output head, and the prediction heads' projection of state and token."""
    again = f"--recompute-granularity full --recompute-method {recompute} --recompute-num-layers 1" if recompute else ""
    s, m = small(pattern, f"{EIGHT_BITS} {again}", 1), machine()
    plain = small(pattern, f"--backend te --mamba-num-heads 16 {again}", 1)
    layers = s.pattern.layers
    products = 2 * sum(weights(layer_linears(symbol, s.sizes)) for symbol in layers) * (4 if recompute else 3)
    if "/" in pattern:
        products += 2 * 3 * (sum(weights(layer_linears(symbol, s.sizes)) for symbol in s.pattern.mtp) + 2 * 384**2)
    tokens = s.layout.global_batch * s.sizes.seq_length
    rate = 989e12 * 0.40
    faster = products * tokens / rate * (1 - 989 / (1979 * EIGHT_BIT_EFFICIENCY))
    less = step_time(plain, m).pipeline - step_time(s, m).pipeline
    assert less == pytest.approx(faster, rel=1e-9) and less > 0


def test_8_bits_need_a_peak_that_is_known():
    s = small("M-*-", EIGHT_BITS, 1)
    with pytest.raises(ValueError, match="--fp8-format: A100 SXM 80GB has no peak in 8 bits that is known"):
        step_time(s, machine(costs.gpu("a100-80gb")))


def test_two_stages_by_hand():
    """The last stage, with the head, is the slower: its 48 micro-batches between one pass of the first, both ways."""
    s, m = small("*-|M-", "--pipeline-model-parallel-size 2", 2), silent()
    (ahead, back), slow = seconds(s, m, 0), sum(seconds(s, m, 1))
    assert slow > ahead + back
    step = step_time(s, m)
    assert step.pipeline == pytest.approx(ahead + 48 * slow + back, rel=1e-9)
    assert step.bubble == pytest.approx(1 - 48 * (ahead + back + slow) / 2 / step.pipeline, rel=1e-6)


@pytest.mark.parametrize(("gpus_per_node", "bandwidth"), [(2, 450e9), (1, 50e9)])
def test_messages_of_stages_take_the_link_between_them(gpus_per_node, bandwidth):
    """Both stages send a hidden state, or its gradient, of 512 x 384 bf16 a micro-batch."""
    s = small("*-|M-", "--pipeline-model-parallel-size 2", 2)
    m = machine(gpus_per_node=gpus_per_node)
    (ahead, back), slow, message = seconds(s, m, 0), sum(seconds(s, m, 1)), 512 * 384 * 2 / bandwidth
    step = step_time(s, m)
    assert step.pipeline == pytest.approx(ahead + back + message + 48 * (slow + message), rel=1e-9)
    assert step.messages == pytest.approx(48 * message, rel=1e-9)
    # the tied embedding: two ranks sum its fp32 gradient, which sends its size
    assert step.data == pytest.approx(s.sizes.padded_vocab * 384 * 4 / bandwidth, rel=1e-9)


@pytest.mark.parametrize(("gpus", "bandwidth"), [(8, 450e9), (16, 50e9)])
def test_replicas_across_nodes_sum_gradients_over_the_network(gpus, bandwidth):
    s = small("M-*-", "", gpus)
    parameters = costs.model_parameters(s.pattern, s.sizes).total
    step = step_time(s, machine())
    assert step.data == pytest.approx(2 * (gpus - 1) / gpus * parameters * 4 / bandwidth, rel=1e-9)
    assert step.messages == 0


def test_tensor_parallelism_divides_products_and_adds_messages():
    one, two = small("M-*-", "", 1), small("M-*-", "--tensor-model-parallel-size 2 --sequence-parallel", 2)
    m = machine()
    # padding of the vocabulary to a multiple of 256, not of 128: 1,000 tokens are 1,024 both times
    assert one.sizes.padded_vocab == two.sizes.padded_vocab
    assert step_time(two, m).compute == pytest.approx(step_time(one, m).compute / 2, rel=1e-9)
    sent = costs.step_communication(two.pattern, two.sizes, two.layout, CommunicationSettings.from_args(two.args))
    assert step_time(two, m).messages == pytest.approx(sent["tensor"].bytes / 450e9, rel=1e-9)


def test_compute_hides_messages_of_replicas_if_they_may_overlap():
    """Of 8 replicas: as far as one micro-batch's compute reaches."""
    plain = small("M-*-", "--use-distributed-optimizer", 8)
    s = small("M-*-", "--use-distributed-optimizer --overlap-grad-reduce", 8)
    for network in (1e9, 4e9, 1e12):
        m = machine(gpus_per_node=1, network=network)
        shown = max(0.0, step_time(plain, m).data - sum(seconds(s, m)))
        # buckets are padded each for themselves: some bytes more
        assert step_time(s, m).data == pytest.approx(shown, rel=1e-3)
    assert step_time(s, m).data == 0 < step_time(plain, m).data


LAYOUTS = {
    "M-*-M-*-": 1,
    "M-|*-|M-|*-": 8,
    "M-*-E": 8,
}


@pytest.mark.parametrize("pattern", LAYOUTS)
def test_a_better_machine_is_never_slower(pattern):
    gpus = LAYOUTS[pattern]
    more = "--pipeline-model-parallel-size 4 " if "|" in pattern else ""
    more += "--num-experts 4 --expert-model-parallel-size 4" if "E" in pattern else ""
    s = small(pattern, more, gpus)
    plain = machine(gpus_per_node=4)
    for field in ("peak", "efficiency", "bandwidth", "nvlink", "network"):
        faster = dataclasses.replace(plain, **{field: getattr(plain, field) * 2})
        before, after = step_time(s, plain).total, step_time(s, faster).total
        assert after < before or (after == before and field in ("nvlink", "network"))
    assert step_time(s, dataclasses.replace(plain, gpus_per_node=8)).total <= step_time(s, plain).total


def test_what_groups_reach_over():
    layout = costs.Layout(tp=2, cp=2, ep=4, etp=1, pp=2, dp=4)
    assert spans(layout) == {
        "tensor": 2,
        "context": 4,
        "expert tensor": 1,
        "expert": 4,
        "data": 16,
        "expert data": 16,
        "pipeline": 32,
        "embedding": 32,
    }


def test_recomputed_flops():
    sizes = small("WMPG-*E/ME/ME", "--num-experts 6 --moe-shared-expert-intermediate-size 64", 1).sizes
    layer = {symbol: costs.layer_flops_per_token(symbol, sizes) for symbol in "*WMPG-E"}
    linear = {symbol: 2 * weights(layer_linears(symbol, sizes)) for symbol in layer}

    def again(layers, *modules, method=None, number=1):
        return recomputed_flops(layers, sizes, Recompute(method, number, frozenset(modules)))

    assert again("*WMPG-E") == 0
    assert again("M-*-", method="uniform") == pytest.approx(layer["M"] + 2 * layer["-"] + layer["*"])
    assert again("M-*-", method="block", number=2) == pytest.approx(layer["M"] + layer["-"])
    assert again("M-*-", method="block", number=9) == again("M-*-", method="uniform", number=2)
    assert again("M-E-", "mlp") == 2 * layer["-"]
    assert again("M-E-", "moe") == layer["E"]
    assert again("M-E-", "shared_experts") == 2 * 3 * 384 * 64  # gate, up and down
    # keys that a query of 512 sees: 512 * 513 / 2 of all; two products of 6 heads of 64
    assert again("*-", "core_attn") == 2 * 2 * 384 * 513 / 2
    assert again("W", "core_attn") == layer["W"] - linear["W"]
    assert again("GM-E", "core_attn") == 0
    assert again("M*-", "ssm") == pytest.approx(layer["M"] - linear["M"])  # convolution and scan
    # P: "intra" is all between its projections, which stay; its branches have their own
    assert again("P", "intra") == pytest.approx(layer["P"] - linear["P"])
    assert again("P", "ssm") + again("P", "core_attn") == pytest.approx(again("P", "intra"))
    d = sizes.of("P")
    assert again("P", "core_attn") == 2 * (d.qk_dim + d.value_dim) * 513 / 2
    # what a recomputed layer recomputes itself runs once more
    assert again("M-", "ssm", method="uniform") == pytest.approx(again("M-", method="uniform") + again("M-", "ssm"))


def test_recomputation_takes_its_time():
    plain = small("M-*-", "", 1)
    full = small("M-*-", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1)
    m = machine()
    head = costs.head_flops_per_token(plain.sizes)
    forward = costs.training_flops_per_token(plain.pattern, plain.sizes) / 3
    ratio = step_time(full, m).compute / step_time(plain, m).compute
    assert ratio == pytest.approx((4 * (forward - head) + 3 * head) / (3 * forward), rel=1e-9)


def test_a_machine_of_given_figures():
    given = machine(peak=5e14, memory=1e9, efficiency=0.5, gpus_per_node=4, network=None)
    assert (given.peak, given.memory, given.efficiency, given.gpus_per_node) == (5e14, 1e9, 0.5, 4)
    assert (given.bandwidth, given.nvlink, given.network) == (3350e9, 450e9, 50e9)
    with pytest.raises(ValueError, match="Give --nvlink-gbps"):
        machine(costs.gpu("gh200-96gb"))
    assert machine(costs.gpu("gh200-96gb"), nvlink=1e11).nvlink == 1e11


@pytest.mark.parametrize(
    ("field", "values"),
    [("efficiency", [0, -1, 3, math.nan])]
    + [(name, [0, -1, math.inf, math.nan]) for name in ("peak", "memory", "bandwidth", "nvlink", "network")]
    + [("gpus_per_node", [0, -8])],
)
def test_a_machine_without_sense(field, values):
    flags = {"peak": "--peak-tflops", "memory": "--memory-gib", "bandwidth": "--memory-bandwidth"}
    for value in values:
        with pytest.raises(ValueError, match=flags.get(field, f"--{field.replace('_', '-')}")):
            machine(**{field: value})
