"""What a plan parses with imports postponed is what it parses with all of Megatron's imports made."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    "--recipe paper-1b-intra",
    "--recipe paper-100m-intra --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
    "--recipe demo --vocab-size 4096 --balance-pipeline 2 --transformer-impl local",
    "--hybrid-layer-pattern M*ME --hidden-size 64 --num-attention-heads 4 --num-experts 4 --vocab-size 128 "
    "--seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --train-iters 3 --lr 1e-3 --mamba-head-dim 16 "
    "--mamba-state-dim 16 --disable-bias-linear --position-embedding-type rope --normalization RMSNorm "
    "--wandb-project mine --wandb-save-dir none",
]
PROGRAM = f"""
import json, sys

def parsed():
    from megatron_hybrid.plan import subject

    return [{{k: str(v) for k, v in vars(subject.read(line.split()).args).items()}} for line in {LINES!r}]

def loaded():
    return [name for name in ("transformers", "wandb.sdk", "torch._inductor") if name in sys.modules]

if sys.argv[1] == "full":
    from megatron_hybrid.cli import arguments

    import wandb
    arguments.choose_device("auto")
    arguments.import_megatron_quietly()
    print(json.dumps([parsed(), loaded()]))
else:
    before = parsed()
    light = loaded()
    import gc
    import torch
    from megatron.core import timers

    assert gc.isenabled() and torch.compile.__module__ == "torch"
    from megatron_hybrid.cli import arguments

    arguments.import_megatron_quietly()
    import wandb
    assert wandb.init and timers.wandb is wandb
    print(json.dumps([before, light, parsed(), loaded()]))
"""


def run(how: str) -> list:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_flags_are_parsed_as_through_the_full_import():
    before, light, after, all_loaded = run("light")
    full, loaded = run("full")
    assert light == [] and all_loaded == ["transformers", "wandb.sdk"] and loaded == [*all_loaded, "torch._inductor"]
    assert len(full) == len(LINES) and len(full[0]) > 500
    for line, one, again, wanted in zip(LINES, before, after, full, strict=True):
        assert {k: (v, wanted.get(k)) for k, v in one.items() if v != wanted.get(k)} == {}, line
        assert one == again == wanted
