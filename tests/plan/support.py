"""What tests of plans share: small runs, machines, and proposals that take seconds to find."""

import functools
from io import StringIO

from rich.console import Console

from megatron_hybrid import costs
from megatron_hybrid.plan import fit
from megatron_hybrid.plan.subject import read
from megatron_hybrid.plan.time import Machine

SIZES = """--hidden-size 384 --num-attention-heads 6 --kv-channels 64 --ffn-hidden-size 512 --mamba-num-heads 12
--mamba-head-dim 64 --mamba-num-groups 2 --seq-length 512 --max-position-embeddings 512 --vocab-size 1000
--normalization RMSNorm --position-embedding-type rope --bf16 --swiglu --disable-bias-linear --attention-dropout 0
--hidden-dropout 0 --moe-token-dispatcher-type alltoall --micro-batch-size 1 --global-batch-size 48"""
SMALL = SIZES.split()
DEMO = "--recipe demo --vocab-size 100"
H100 = costs.gpu("h100-80gb")
LONG = ["--seq-length", "32768", "--max-position-embeddings", "32768"]


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


PAPER = [f"paper-1b-{name}" for name in ("llama", "swa", "mamba", "inter", "intra")]

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


def printed(show, found, width=160):
    stream = StringIO()
    show(found, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()
