"""Plans: what they add up to, a step's time by hand, and layouts that a run accepts. Megatron is imported once."""

import dataclasses
import functools
import json
import math
import os
import sys
from io import StringIO

import pytest
from rich.console import Console

from megatron_hybrid import costs
from megatron_hybrid.accounting.activation_settings import Recompute
from megatron_hybrid.accounting.tensors import weights
from megatron_hybrid.accounting.traffic import CommunicationSettings
from megatron_hybrid.cli.recipes import flags_to_argv, recipe
from megatron_hybrid.costs.hardware import gpu
from megatron_hybrid.costs.parameters import layer_linears
from megatron_hybrid.layers.registry import LAYERS
from megatron_hybrid.plan import comparison, fit, plots, tables
from megatron_hybrid.plan.figures import figures, memory, times
from megatron_hybrid.plan.subject import Where, read
from megatron_hybrid.plan.time import Machine, recomputed_flops, spans, step_time

SIZES = """--hidden-size 384 --num-attention-heads 6 --kv-channels 64 --ffn-hidden-size 512 --mamba-num-heads 12
--mamba-head-dim 64 --mamba-num-groups 2 --seq-length 512 --max-position-embeddings 512 --vocab-size 1000
--normalization RMSNorm --position-embedding-type rope --bf16 --swiglu --disable-bias-linear --attention-dropout 0
--hidden-dropout 0 --moe-token-dispatcher-type alltoall --micro-batch-size 1 --global-batch-size 48"""
SMALL = SIZES.split()
DEMO = "--recipe demo --vocab-size 100"
H100 = costs.gpu("h100-80gb")


def machine(gpu=H100, **changes):
    return Machine.of(gpu, "bf16", **changes)


def silent(**changes):
    """A machine whose messages take no time to speak of."""
    return machine(nvlink=1e40, network=1e40, **changes)


@functools.cache
def small(pattern, more="", gpus=None):
    return read(["--hybrid-layer-pattern", pattern, *SMALL, *more.split()], gpus)


@functools.cache
def planned(line, gpus=None):
    return read(line.split(), gpus)


@pytest.fixture(scope="module", autouse=True)
def help_texts_are_read_once():
    """Megatron parses them out of its sources for every command line, which is most of the time of a reading."""
    planned(DEMO)  # the CPU engine comes before any of Megatron
    from megatron.training.argument_utils import ArgumentGroupFactory

    read_texts, known = ArgumentGroupFactory._get_field_docstrings, {}

    def once(self, described):
        if described not in known:
            known[described] = read_texts(self, described)
        return known[described]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentGroupFactory, "_get_field_docstrings", once)
        yield


# Reading -----------------------------------------------------------------------------------------


def test_reading_leaves_the_process_as_it_was(monkeypatch):
    for name, value in {"WORLD_SIZE": "7", "RANK": "5", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    words, environment = list(sys.argv), dict(os.environ)
    subject = read([*DEMO.split(), "--tensor-model-parallel-size", "2", "--sequence-parallel"])
    assert subject.layout.world == subject.layout.tp * subject.layout.dp == 4  # the fewest, not 7: tp 2 and ep 2
    assert (sys.argv, dict(os.environ)) == (words, environment)
    with pytest.raises(ValueError):
        read([*DEMO.split(), "--tensor-model-parallel-size", "3"])
    assert (sys.argv, dict(os.environ)) == (words, environment)


def test_a_run_on_cuda_is_planned_without_one():
    assert planned(DEMO).args.device == "cuda"
    assert read(DEMO.split(), device="cpu").args.device == "cpu"


def test_more_gpus_are_replicas():
    layout = planned("--recipe paper-1b-intra --tensor-model-parallel-size 2", 64).layout
    assert (layout.tp, layout.dp, layout.world) == (2, 32, 64)


def test_stages_that_megatron_cuts_itself_are_in_the_pattern():
    subject = small("M-*-M-*-", "--pipeline-model-parallel-size 4")
    assert str(subject.pattern) == "M-|*-|M-|*-" and subject.args.hybrid_layer_pattern == "M-*-M-*-"


@pytest.mark.parametrize(
    ("line", "gpus", "text"),
    [
        ("--recipe demo", None, "needs --vocab-size"),
        ("--recipe paper-1b-itra", None, "did you mean paper-1b-intra"),
        ("", None, "has no layers"),
        ("--recipe paper-1b-intra", 0, "--gpus 0: give at least 1"),
        ("--recipe paper-1b-intra", -8, "--gpus -8: give at least 1"),
        ("--recipe paper-1b-intra --tensor-model-parallel-size 2", 3, "3 processes do not divide"),
        ("--recipe paper-1b-intra --tensor-model-parallel-size 3", 3, "must be a multiple"),
        ("--recipe paper-1b-intra --pipeline-model-parallel-size 4", 4, "do not divide over 4 pipeline stages"),
        ("--recipe paper-1b-intra --micro-batch-size 3", 8, "is not a multiple of --micro-batch-size 3 times 8"),
        ("--recipe paper-1b-intra --vocab-size -5", 8, "--vocab-size is -5 and must be at least 1"),
        ("--recipe paper-1b-intra --train-iters -4", 8, "--train-iters is -4 and must be at least 0"),
        ("--recipe paper-1b-intra --backend te --fp8-format hybrid", 8, "--fp8-format: memory and time .* Drop it"),
        ("--recipe paper-1b-intra --hiden-size 3", 8, "Did you mean --hidden-size"),
    ],
)
def test_what_a_run_is_refused_for(line, gpus, text):
    with pytest.raises(ValueError, match=text):
        read(line.split(), gpus)


# Figures -----------------------------------------------------------------------------------------

EVERY_KIND = [
    DEMO,
    "--recipe paper-1b-intra",
    "--recipe paper-1b-swa",
    "--recipe paper-1b-intra-moe --expert-model-parallel-size 4",
    "--recipe paper-1b-intra-diff-transformer",
    "--recipe paper-3b-inter --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
    " ".join(["--hybrid-layer-pattern WMPG-*E/ME/ME --num-experts 6", *SMALL]),
    " ".join(["--hybrid-layer-pattern GE/*-/*- --num-experts 8 --mtp-use-repeated-layer", *SMALL]),
    " ".join(["--hybrid-layer-pattern M-*- --untie-embeddings-and-output-weights", *SMALL]),
]


@pytest.mark.parametrize("line", EVERY_KIND)
def test_parts_add_up_to_the_model(line):
    s = planned(line)
    f = figures(s, machine())
    assert json.loads(json.dumps(f, allow_nan=False)) == f
    model = costs.model_parameters(s.pattern, s.sizes)
    for name, whole in (("parameters", model.total), ("active", model.active)):
        assert sum(part[name] for part in f["parts"]) == whole
    assert f["parameters"] == {name: getattr(model, name) for name in f["parameters"]}
    flops = costs.training_flops_per_token(s.pattern, s.sizes)
    # sums of the same floats in another order
    assert sum(part["training_flops_per_token"] for part in f["parts"]) == pytest.approx(flops, rel=1e-12)
    assert [part["symbol"] for part in f["parts"] if part["symbol"] in LAYERS] == [
        symbol for symbol in LAYERS if symbol in s.pattern.layers
    ]


@pytest.mark.parametrize("line", EVERY_KIND)
def test_figures_are_those_of_costs(line):
    s = planned(line)
    f = figures(s)
    for convention in ("model", "paper"):
        per_token = costs.training_flops_per_token(s.pattern, s.sizes, convention)
        found = f["flops"][convention]
        assert found["per_token"] == per_token
        assert found["per_sample"] == costs.training_flops(s.pattern, s.sizes, 1, convention)
        assert found["run"] == (per_token * s.tokens if s.tokens else None)
    cache = f["cache"]
    assert cache["total"] == [costs.model_cache(s.pattern, s.sizes, n).size() for n in cache["lengths"]]
    assert [sum(column) for column in zip(*cache["layers"].values(), strict=True)] == cache["total"]
    storage, settings = costs.Storage.from_args(s.args), costs.ActivationSettings.from_args(s.args)
    assert len(f["memory"]) == s.layout.pp
    for stage, row in enumerate(f["memory"]):
        held = costs.rank_memory(s.pattern, s.sizes, s.layout, storage, stage)
        kept = costs.stage_activation_bytes(s.pattern, s.sizes, s.layout, settings, stage)
        assert row["total"] == held.total + kept == sum(v for k, v in row.items() if k != "total")
    work = costs.stage_work(s.pattern, s.sizes, s.layout.pp)
    assert [stage["share"] for stage in f["pipeline"]["stages"]] == [w / sum(work) for w in work]
    assert "".join(stage["layers"] for stage in f["pipeline"]["stages"]).replace("|", "") == s.pattern.layers
    assert "time" not in f
    sent = [
        costs.step_communication(s.pattern, s.sizes, s.layout, CommunicationSettings.from_args(s.args), stage)
        for stage in range(s.layout.pp)
    ]
    bytes_sent = sum(traffic["bytes"] for traffic in f["communication"].values())
    assert bytes_sent == pytest.approx(max(sum(t.bytes for t in by_group.values()) for by_group in sent))


# Comparison --------------------------------------------------------------------------------------

PAPER = [f"paper-1b-{name}" for name in ("llama", "swa", "mamba", "inter", "intra")]


def compared(words, match=None, flags=(), convention="paper"):
    found = comparison.subjects(words, flags, Where())
    return comparison.compare(found, match, convention)["architectures"]


def test_equal_flops_are_the_papers_tokens():
    """Bae et al., arXiv:2510.04800, table 2: 60, 71, 73, 73 and 72 billion tokens on 4.470e20 FLOPs."""
    rows = compared(PAPER, "flops")
    assert [round(row["tokens"] / 1e9) for row in rows] == [60, 71, 73, 73, 72]
    assert [f"{row['flops']['paper']['run']:.3e}" for row in rows] == ["4.470e+20"] * 5
    assert [row["iterations"] for row in rows] == [round(row["tokens"] / (256 * 8192)) for row in rows]


def test_flops_are_matched_in_the_convention_that_is_asked_for():
    rows = compared(PAPER[:2], "flops", convention="model")
    runs = [row["flops"]["model"]["run"] for row in rows]
    assert runs[0] == pytest.approx(runs[1], rel=1e-12)
    assert rows[0]["flops"]["paper"]["run"] != pytest.approx(rows[1]["flops"]["paper"]["run"], rel=1e-3)


def test_equal_parameters_are_the_papers_blocks():
    """The blocks of the paper's 1B models (its table 8), from whatever number the command line has."""
    rows = compared(PAPER, "parameters", ["--num-blocks", "16"])
    mixers = [sum(LAYERS[c].kind == "mixer" for c in row["pattern"]) for row in rows]
    assert mixers == [16, 16, 13, 13, 13]
    assert {row["tokens"] for row in rows} == {rows[0]["tokens"]}
    assert [row["name"] for row in rows] == PAPER
    nearest = abs(rows[4]["parameters"]["active_non_embedding"] - rows[0]["parameters"]["active_non_embedding"])
    for blocks in ("12", "14"):
        other = read(["--recipe", PAPER[4], "--num-blocks", blocks])
        distance = costs.model_parameters(other.pattern, other.sizes).active_non_embedding
        assert abs(distance - rows[0]["parameters"]["active_non_embedding"]) > nearest


def test_patterns_are_compared_in_the_sizes_of_the_command_line():
    rows = compared(["M-M-M-", "*-M-*-"], flags=SMALL)
    assert [row["name"] for row in rows] == ["M-M-M-", "*-M-*-"]
    assert [row["pattern"] for row in rows] == ["M-M-M-", "*-M-*-"]
    s = small("M-M-M-")
    assert rows[0]["parameters"]["total"] == costs.model_parameters(s.pattern, s.sizes).total
    assert [row["tokens"] for row in rows] == [None, None]


def test_patterns_beside_a_recipe_have_names_of_their_own():
    assert [row["name"] for row in compared(["M-M-", "*-*-"], flags=["--recipe", PAPER[4]])] == ["M-M-", "*-*-"]
    assert [row["name"] for row in compared(PAPER[:2], flags=["--recipe", PAPER[4]])] == PAPER[:2]


@pytest.mark.parametrize(
    ("words", "match", "text"),
    [
        (PAPER[:1], None, "takes two or more architectures"),
        (["M-M-", "*-*-"], "flops", "needs the length of M-M-, its reference: give --train-iters"),
        ([PAPER[0], "M-M-"], "parameters", "M-M- is an explicit pattern"),
        ([PAPER[0], "paper-1b-itra"], None, "did you mean paper-1b-intra"),
        ([PAPER[0], "M-M-|*"], None, "M-M-|*: "),
    ],
)
def test_what_cannot_be_compared(words, match, text):
    flags = SMALL if words[0] == "M-M-" else ["--recipe", PAPER[0]]
    with pytest.raises(ValueError) as caught:
        compared(words, match, flags)
    assert text in str(caught.value)


# Time --------------------------------------------------------------------------------------------


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


# Layouts that fit --------------------------------------------------------------------------------

LONG = ["--seq-length", "32768", "--max-position-embeddings", "32768"]
# words, GPUs, GiB of a GPU: little enough that recomputation or parallelism is needed where a figure is given
RUNS = {
    "3b": (["--recipe", "paper-3b-intra"], 64, 40),
    "moe": (["--recipe", "paper-1b-intra-moe"], 16, 20),
    "13 blocks on 13": (["--recipe", "paper-1b-inter", "--global-batch-size", "26"], 13, 80),
    "long": (["--recipe", "paper-1b-inter", *LONG, "--global-batch-size", "32"], 16, 24),
    "demo": (DEMO.split(), 8, 80),
    "6 experts, MTP": (["--hybrid-layer-pattern", "M-*-WE/ME/ME", "--num-experts", "6", *SMALL], 12, 80),
    "6 heads, 3 query groups": (
        ["--hybrid-layer-pattern", "*-W-" * 3 + "*-", "--group-query-attention", "--num-query-groups", "3", *SMALL],
        16,
        0.05,
    ),
    "delta nets": (["--hybrid-layer-pattern", "GEGE", "--num-experts", "8", *SMALL], 16, 80),
    "a small share": (["--hybrid-layer-pattern", "MEME*-", "--num-experts", "8", *SMALL], 16, 0.05),
    "P with MTP": (["--hybrid-layer-pattern", "P-P-P-/*-/*-", *SMALL], 12, 0.4),
    "flags of its own": (
        ["--hybrid-layer-pattern", "M-*-W-*-", "--use-distributed-optimizer", "--micro-batch-size=2", *SMALL[:-4]]
        + ["--global-batch-size", "48", "--tensor-model-parallel-size", "2", "--sequence-parallel"],
        8,
        80,
    ),
}


@functools.cache
def fitted(name, most=2):
    argv, gpus, gib = RUNS[name]
    return fit.fit(argv, gpus, machine(memory=gib * 2**30), most=most), argv, gpus


@pytest.mark.parametrize("name", RUNS)
def test_what_is_proposed_is_accepted_and_fits(name):
    """Each through a run's own checks, from its flags alone, and below the limit as a plan of these flags says."""
    found, argv, gpus = fitted(name)
    m = machine(memory=RUNS[name][2] * 2**30)
    assert found["limit"] == 0.9 * m.memory and found["gpus"] == gpus
    assert 0 < len(found["proposals"]) <= 2 and found["fitting"] <= found["tried"] and found["least"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for p in found["proposals"]:
        s = read([*argv, *p["flags"]], gpus)
        assert dataclasses.asdict(s.layout) == p["layout"] and s.layout.world == gpus
        assert str(s.pattern) == p["pattern"]
        fullest = max(memory(s), key=lambda row: row["total"])
        assert p["memory"] == fullest and fullest["total"] <= found["limit"]
        assert p["time"]["step"] == step_time(s, m).total
        assert s.layout.micro_batch in p["micro_batches_that_fit"]
        assert s.layout.tp <= m.gpus_per_node and s.layout.sequence_parallel == (s.layout.tp > 1)
        assert s.args.use_distributed_optimizer
    steps = [p["time"]["step"] for p in found["proposals"]]
    assert steps == sorted(steps)


@pytest.mark.parametrize("name", ["moe", "6 experts, MTP", "long", "P with MTP"])
def test_the_search_counts_what_a_run_counts(name):
    """It changes arguments without Megatron's parser; every so many of its layouts are read from their flags."""
    argv, gpus, gib = RUNS[name]
    m = machine(memory=gib * 2**30)
    layouts = list(fit._layouts(read(argv), argv, gpus, m))
    for subject, flags in layouts[:: max(1, len(layouts) // 3)]:
        candidate = fit._least_recomputation(subject, flags, 0.9 * m.memory, argv)
        s = read([*argv, *candidate.flags], gpus)
        assert (s.layout, s.pattern, s.sizes) == (subject.layout, subject.pattern, subject.sizes)
        assert max(row["total"] for row in memory(s)) == candidate.bytes
        assert step_time(s, m) == step_time(candidate.subject, m)


def test_long_contexts_are_spread_over_ranks():
    found, *_ = fitted("long")
    assert any(p["layout"]["cp"] > 1 for p in found["proposals"])
    found, *_ = fitted("3b")
    assert all(p["layout"]["cp"] == 1 for p in found["proposals"])


def test_recomputation_is_proposed_where_memory_is_short():
    plain, *_ = fitted("3b")
    assert not any("recompute" in word for word in plain["proposals"][0]["flags"])
    argv = [*RUNS["3b"][0], "--pipeline-model-parallel-size", "1", "--tensor-model-parallel-size", "4"]
    tight = fit.fit([*argv, "--sequence-parallel", "--micro-batch-size", "4"], 8, machine(memory=30 * 2**30))
    assert tight["tried"] == 1
    assert any("recompute" in word for word in tight["proposals"][0]["flags"])


def test_flags_of_the_command_line_are_kept():
    found, argv, _ = fitted("flags of its own")
    assert {(p["layout"]["tp"], p["layout"]["micro_batch"]) for p in found["proposals"]} == {(2, 2)}
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    for p in found["proposals"]:
        assert given.isdisjoint(p["flags"])
    cut = ["--hybrid-layer-pattern", "M-M-|*-M-", "--pipeline-model-parallel-size", "2", *SMALL]
    found = fit.fit([*cut, "--recompute-granularity", "full", "--recompute-method", "block"], 8, machine(), most=2)
    assert {(p["layout"]["pp"], p["pattern"]) for p in found["proposals"]} == {(2, "M-M-|*-M-")}
    assert not any("recompute" in word for p in found["proposals"] for word in p["flags"])


def test_where_nothing_fits_the_least_is_named():
    argv, gpus = RUNS["3b"][0], 8
    found = fit.fit(argv, gpus, machine(memory=2**30))
    assert found["proposals"] == [] and found["fitting"] == 0 < found["tried"]
    least = found["least"]
    s = read([*argv, *least["flags"]], gpus)
    assert max(row["total"] for row in memory(s)) == least["bytes"] > found["limit"]
    # it fits as soon as there is room for it, and no sooner
    short, enough = (fit.fit(argv, gpus, machine(memory=least["bytes"] / 0.9 * (1 + e)), most=1) for e in (-1e-9, 1e-9))
    assert short["fitting"] == 0 < enough["fitting"]


@pytest.mark.parametrize(
    ("argv", "gpus", "text"),
    [
        (["--recipe", "paper-1b-intra"], 0, "--gpus 0"),
        (["--recipe", "demo"], 8, "--vocab-size"),
        (["--recipe", "paper-1b-intra", "--tensor-model-parallel-size", "3"], 6, "must be a multiple"),
    ],
)
def test_what_no_layout_helps(argv, gpus, text):
    with pytest.raises(ValueError, match=text):
        fit.fit(argv, gpus, machine())


# Text and pictures -------------------------------------------------------------------------------


def printed(show, found, width=160):
    stream = StringIO()
    show(found, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


@pytest.fixture(scope="module")
def plan_of_stages():
    line = "--recipe paper-1b-intra-moe --pipeline-model-parallel-size 2 --balance-pipeline 4 --global-batch-size 64"
    return figures(planned(f"{line} --expert-model-parallel-size 4", 16), machine())


@pytest.fixture(scope="module")
def comparison_of_recipes():
    found = comparison.subjects(PAPER, [], Where())
    return comparison.compare(found, "flops", "paper", machine=machine())


@pytest.fixture(scope="module")
def proposals():
    return fitted("6 experts, MTP", most=3)[0]


def test_the_tables_of_a_plan(plan_of_stages):
    f, text = plan_of_stages, printed(tables.show, plan_of_stages)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 160
    assert not any(line.rstrip().endswith("…") for line in lines)
    for part in f["parts"]:
        (line,) = [line for line in lines if line.startswith(f"{part['symbol'] or ' '} {part['name']}  ")][:1]
        for value in (f"{part['parameters']:,}", f"{part['active']:,}", f"{part['training_flops_per_token']:.3e}"):
            assert value in line.split()
    for stage, row in enumerate(f["memory"]):
        numbers = [f"{row[name] / 2**30:,.2f}" for name in tables.MEMORY]
        assert [str(stage), *numbers] in [line.split() for line in lines]
    for group, sent in f["communication"].items():
        expected = [*group.split(), f"{sent['calls']:,}", f"{sent['bytes'] / 2**30:,.2f}"]
        assert expected in [line.split() for line in lines]
    assert f"{f['time']['step']:.3f}" in text and f"{f['time']['mfu']:.1%}" in text
    assert f"{f['flops']['paper']['run']:.3e}" in text and f["pattern"] in text
    for size in f["cache"]["total"]:
        assert f"{size / 2**20:,.1f}" in text
    bars = [line.count("█") for line in lines if "█" in line]
    shares = [stage["share"] for stage in f["pipeline"]["stages"]]
    assert bars == [round(40 * share / max(shares)) for share in shares]


def test_a_plan_of_one_gpu_says_so():
    text = printed(tables.show, figures(planned(DEMO)))
    assert "Expected on" not in text and "Work of the pipeline stages" not in text
    alone = printed(tables.show, figures(small("M-*-", "", 1)))
    assert "No messages between ranks" in alone


def test_the_table_of_a_comparison(comparison_of_recipes):
    lines = printed(tables.show_comparison, comparison_of_recipes).splitlines()
    assert max(map(len, lines)) <= 160
    rows = [line.split() for line in lines if line.startswith("paper-1b-")]
    assert [row[0] for row in rows] == PAPER
    assert [row[1] for row in rows] == ["16", "16", "13", "13", "13"]
    assert all("4.470e+20" in row for row in rows)
    for row, f in zip(rows, comparison_of_recipes["architectures"], strict=True):
        assert row[-1] == f"{f['tokens'] / f['time']['tokens_per_day']:.1f}"


def test_the_table_of_layouts(proposals):
    text = printed(tables.show_fit, proposals)
    for i, p in enumerate(proposals["proposals"], 1):
        assert f"  {i}  {' '.join(p['flags'])}" in text  # in one line, to be copied
        assert f"{p['time']['step']:.3f}" in text
    assert max(map(len, text.partition("Flags to add")[0].splitlines())) <= 160
    nothing = proposals | {"proposals": [], "least": {"flags": ["--a", "1"], "bytes": 2**30}}
    assert "None fits. The smallest takes 1.00 GiB:\n  --a 1" in printed(tables.show_fit, nothing)


@pytest.mark.parametrize("value", [None, 0, 999, 1e3, 999_999, 1.5e9, 59_999_518_720, 2e13])
def test_quantities(value):
    text = tables.quantity(value)
    if value is None:
        assert text == ""
    else:
        number = float(text.rstrip("KMBT")) * {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1)
        assert number == pytest.approx(value, rel=5e-3)
        assert "e" not in text


@pytest.mark.parametrize("kind", ["plot", "plot_comparison", "plot_fit"])
def test_pictures_are_written(kind, tmp_path, plan_of_stages, comparison_of_recipes, proposals):
    found = {"plot": plan_of_stages, "plot_comparison": comparison_of_recipes, "plot_fit": proposals}[kind]
    draw = getattr(plots, kind)
    draw(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    draw(found, tmp_path / "plan.svg")
    assert "</svg>" in (tmp_path / "plan.svg").read_text()


def test_there_is_no_picture_of_nothing(tmp_path, proposals):
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.plot_fit(proposals | {"proposals": []}, tmp_path / "plan.png")
    assert list(tmp_path.iterdir()) == []


# What a first user met -----------------------------------------------------------------------------


def test_a_plan_says_whether_it_fits():
    line = "--recipe paper-3b-llama --micro-batch-size 1"
    roomy, tight = (figures(planned(line, 64), machine(memory=gib * 2**30)) for gib in (80, 40))
    assert "Fits: " in printed(tables.show, roomy)
    assert "DOES NOT FIT: 45." in printed(tables.show, tight)
    assert tight["machine"]["limit"] == 0.9 * 40 * 2**30


def test_architectures_that_do_not_fit_have_no_time():
    found = comparison.subjects(["paper-3b-llama", "paper-1b-llama"], [], Where(64))
    text = printed(tables.show_comparison, comparison.compare(found, None, machine=machine(memory=40 * 2**30)))
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("paper-")}
    assert "does not fit" in rows["paper-3b-llama"] and "does not fit" not in rows["paper-1b-llama"]
    assert "times on 64 x " in text


def test_layouts_of_a_given_number_of_stages_are_cut_by_work():
    argv = ["--recipe", "paper-1b-intra", "--pipeline-model-parallel-size", "4"]  # 26 layers do not divide by 4
    found = fit.fit(argv, 64, machine(), most=3)["proposals"]
    assert found
    for proposal in found:
        assert proposal["layout"]["pp"] == 4
        assert "--balance-pipeline" in proposal["flags"]
        assert "--pipeline-model-parallel-size" not in proposal["flags"]


def test_a_model_without_a_recipe_needs_no_micro_batch_to_be_fitted():
    flags = recipe("paper-1b-inter").flags
    kept = {flag: value for flag, value in flags.items() if flag != "--micro-batch-size"}
    found = fit.fit(flags_to_argv(kept), 8, machine(), most=1)["proposals"]
    assert found[0]["micro_batches_that_fit"][0] == 1 and len(found[0]["micro_batches_that_fit"]) > 1


def test_parameters_are_matched_without_a_length():
    found = comparison.subjects(["paper-1b-llama", "paper-1b-mamba"], ["--train-iters", "0"], Where())
    rows = comparison.compare(found, "parameters")["architectures"]
    assert [row["tokens"] for row in rows] == [None, None]


def test_heads_are_counted_one_by_one_and_stand_on_the_last_stage():
    f = figures(small("M-*-|M-*-/*-/*-", "--pipeline-model-parallel-size 2", 2))
    (heads,) = [part for part in f["parts"] if part["symbol"] == "/"]
    assert heads["count"] == 2 and heads["parameters"] == 2 * heads["parameters_each"]
    assert [stage["beside"] for stage in f["pipeline"]["stages"]] == [["embedding"], ["2 x /*-", "output head"]]


def test_links_beyond_a_bridge_are_the_networks():
    bridged = Machine.of(gpu("a100-pcie-80gb"), "bf16")
    assert bridged.nvlink_gpus == 2
    argv = "--recipe paper-1b-inter --tensor-model-parallel-size"
    times = [step_time(planned(f"{argv} {tp} --sequence-parallel", 8), bridged).messages for tp in (2, 4)]
    slow = Machine.of(gpu("a100-pcie-80gb"), "bf16", network=1e9)
    assert step_time(planned(f"{argv} 2 --sequence-parallel", 8), slow).messages == times[0]
    assert step_time(planned(f"{argv} 4 --sequence-parallel", 8), slow).messages > 10 * times[1]
    given = Machine.of(gpu("a100-pcie-80gb"), "bf16", nvlink=3e11, network=1e9)
    assert step_time(planned(f"{argv} 4 --sequence-parallel", 8), given).messages < times[1]


def test_the_bubble_of_a_plan():
    assert figures(small("M-*-", "", 1))["pipeline"]["bubble"] == pytest.approx(0, abs=1e-12)
    f = figures(small("M-|*-", "--pipeline-model-parallel-size 2 --global-batch-size 1", 2))
    # one micro-batch: each of two stages waits while the other works, whatever their shares
    assert f["pipeline"]["bubble"] == pytest.approx(0.5, rel=1e-12)
    assert "stages wait 50.0% of a step's time" in printed(tables.show, f)
