"""The engine's reaches: upstream still stands as they expect it, and what they replace works.

The first half reads the source of megatron-core (upstream_contracts.py) and fails when the place that a reach
answers has moved; the second runs the reaches in ranks with the CPU engine.
"""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.data.corpora import preprocess, train_bpe, write
from tests.patches import engine_cases as cases
from tests.patches.upstream_contracts import CONTRACTS, UPSTREAM, VERSION, Contract, node
from tests.support.training import folder, initial_checkpoint

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_hybrid"
FILES = [
    *(
        p
        for room in ("patches", "checkpoint", "training")
        for p in PACKAGE.glob(f"{room}/*.py")
        if p.stem != "warm_start"
    ),
    *(PACKAGE / name for name in ("cli/arguments.py", "cli/connections.py", "errors.py", "launch/agent.py")),
]
"""Where upstream is read or patched."""

# Public functions that replace or rely on nothing inside Megatron that could move unseen
NO_REACH = {
    "prepare": "calls the others",
    "pad_buckets": "a step of save_optimizer_buckets_in_place",
    "has_module": "Python's own",
    "write_run": "writes a file",
    "peak": "of torch's public interface",
    "peak_notes": "of torch's public interface",
    "peak_memory": "of torch's public interface",
    "short": "has none",
    "is_active": "of the CPU engine",
    "install": "of the CPU engine",
    "choose_device": "of torch's public interface",
    "choose_backend": "has none",
    "help_text": "calls add_hybrid_flags",
    "balance": "of flags, by the parser that parse() calls",
    "import_megatron_quietly": "an import",
    "set_single_process_defaults": "of torchrun's environment variables",
    "check_data": "of flags, which parse() would miss",
    "check_end_of_document": "of flags, by Megatron's public build_tokenizer",
    "check_tokenizer": "of flags, which parse() would miss",
    "check_provenance": "of flags and of files that we write",
    "check_checkpoint": "calls stored_common",
    "stored_arguments": "calls stored_common",
    "takes_weights_alone": "of flags",
    "check_model": "of stored flags",
    "check_schedule": "of what stored_common and schedule find",
    "agree_on_schedule": "called by load_optimizers_of_other_schedules",
    "split_config": "called by validate_on_whole_sets",
    "prefixes": "calls blends",
    "has_validation": "of Megatron's public get_blend_and_blend_per_split",
    "check_content": "of files, and of Megatron's public get_tokenizer",
    "check_data_content": "calls check_content and stored_arguments",
    "compare_tokenizer": "calls compare",
    "vocabulary": "of a tokenizer's files",
    "load_object": "of torch's public load",
    "load_index": "of numpy's public load",
    "check_optimizer_state": "of flags, which upstream would meet with the model built",
    "layers_of_experts": "of the pattern",
    "expert_loads": "of what routers finds",
    "open_checkpoint": "calls stored_arguments",
    "verified": "reads files",
    "check": "of flags that retention and background saves need",
    "agree": "of torch's public store",
    "among_ranks": "calls agree",
    "rendezvous_store": "of torch's public rendezvous",
    "fill": "of what stored_tensors finds",
    "upstream_errors_as_value_errors": "of Python's exceptions",
    "check_configs": "calls what train() calls",
}


# Upstream's side -------------------------------------------------------------------------------------


def test_the_reaches_are_written_for_the_installed_version():
    assert metadata.version("megatron-core") == VERSION


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: f"{c.reach}-{c.name or c.file}")
def test_upstream_stands_as_the_reach_expects(contract: Contract):
    found = node(contract.file, contract.name)
    if contract.arguments is not None:
        assert [a.arg for a in (*found.args.posonlyargs, *found.args.args)] == contract.arguments.split()
        assert not found.args.kwonlyargs
    code = ast.unparse(found)
    for text in contract.holds:
        assert text in code
    for text in contract.lacks:
        assert text not in code


def test_every_public_function_that_knows_upstream_has_a_contract():
    functions = {
        n.name
        for path in FILES
        for n in ast.parse(path.read_text()).body
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
    }
    answered = {contract.reach for contract in CONTRACTS}
    assert functions == (answered & functions) | set(NO_REACH)
    assert not answered & set(NO_REACH)


def test_the_lines_that_docstrings_name_are_those_of_the_contracts():
    named, astray = 0, []
    functions = [n for path in FILES for n in ast.parse(path.read_text()).body]
    for n in functions:
        text = ast.get_docstring(n) if isinstance(n, ast.FunctionDef) else None
        for file, line in re.findall(r"\(((?:core|training)/[\w/]+\.py):(\d+)", text or ""):
            places = [node(c.file, c.name) for c in CONTRACTS if (c.reach, c.file) == (n.name, file)]
            # a contract on a whole file has no lines of its own and spans any
            spans = [(getattr(p, "lineno", 1), getattr(p, "end_lineno", 10**6)) for p in places]
            named += 1
            if not any(first <= int(line) <= last for first, last in spans):
                astray.append(f"{n.name}: {file}:{line}")
    assert astray == []
    assert named > 8


def test_the_wheel_has_the_helpers_but_not_their_makefile():
    folder = UPSTREAM / "core" / "datasets"
    assert list(folder.glob("helpers_cpp*.so"))
    assert not (folder / "Makefile").exists(), "upstream's own compile_helpers would work: drop skip_helper_compilation"


# The CPU engine --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    """What a process that has not installed the CPU engine reports (engine_cases.main)."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.patches.engine_cases"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_every_replaced_name_is_one_of_torch_with_a_reason(fresh):
    assert fresh["missing"] == []
    assert fresh["without reason"] == []
    assert fresh["twice in the table"] == []


def test_install_is_on_request_once_and_whole(fresh):
    assert (fresh["before"], fresh["after"]) == (False, True)
    assert fresh["modes"] == 1  # of two calls
    assert fresh["not replaced"] == []


def test_install_refuses_when_cuda_runs_already(fresh):
    assert "CUDA is already initialised" in fresh["initialised"]
    assert "--device cuda" in fresh["initialised"]
    assert fresh["untouched after refusal"]


def test_tensors_asked_for_on_cuda_are_on_the_cpu(ranks):
    found = ranks(1).run(cases.devices)[0]
    assert found == dict.fromkeys(found, "cpu")


def test_events_streams_and_type_names(ranks):
    found = ranks(1).run(cases.imitations)[0]
    assert 20 <= found["milliseconds"] < 5000  # slept for 20 ms, on a machine that others use
    assert found["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.cuda.HalfTensor"]
    assert found["converted"] == "torch.float64"
    assert (found["cuda"], found["accelerator"]) == (True, False)


def test_host_and_device_random_states_are_two(ranks):
    found = ranks(1).run(cases.random_streams)[0]
    assert [what for what, holds in found.items() if not holds] == []


def test_forked_random_states_restore_what_they_found(ranks):
    found = ranks(1).run(cases.tracker)[0]
    assert [what for what, holds in found.items() if not holds] == []


# Reaches into Megatron -------------------------------------------------------------------------------


def test_upstream_parses_and_counts_our_symbols(ranks):
    found = ranks(1).run(cases.upstream_patterns, pattern="M-P|W-/P-/P-")[0]
    assert (found["main"], found["mtp"], found["depths"], found["layers"]) == ("M-P|W-", "P-", 2, 5)
    # one P in the layers and one in each of two heads
    assert {s: n for s, n in found["counts"].items() if n} == {"M": 1, "P": 3, "W": 1, "-": 4}
    assert {"P", "W"} <= set(found["symbols"])


def test_the_dataset_helpers_are_there_and_not_compiled(ranks):
    names = ranks(1).run(cases.helpers)[0]
    assert {"build_sample_idx_int32", "build_mapping", "build_blending_indices"} <= set(names)


@pytest.fixture(scope="module")
def step(ranks):
    return ranks(1).run(cases.mtp_and_delta_net)[0]


def test_prediction_heads_are_built_from_our_stack(step):
    assert step["head"] == "megatron_hybrid.model.stack.HybridLayerStack"
    assert step["layers"] == 2


def test_delta_nets_and_heads_train(step):
    assert 0 < step["norm"] < 100 and 0 < step["loss"] < 100
    assert step["unmoved"] == []  # no parameter, in heads and delta net either


def test_the_distributed_optimizer_holds_our_adam(step):
    assert step["optimizer"] == "megatron_hybrid.patches.adam.FusedAdam"
    assert step["state"] == ["exp_avg", "exp_avg_sq"]
    assert set(step["steps"]) == {1}


def test_the_mixer_has_our_kernels_and_a_lost_name_is_an_error(ranks):
    found = ranks(1).run(cases.mamba_names)[0]
    assert found.pop("error") == "megatron.core.ssm.mamba_mixer has no MAMBA_HAS_STATE_DTYPE: it has changed upstream"
    assert found == dict.fromkeys(found, True)


@pytest.mark.parametrize("sizes", [[3, 1], [0, 2], [2, 2]])
def test_unequal_parts_gather_and_scatter(ranks, sizes):
    for found in ranks(2).run(cases.uneven, sizes=sizes):
        assert found == dict.fromkeys(found, True)


def test_the_dispatcher_exchanges_unequal_parts(ranks):
    first, second = ranks(2).run(cases.exchange)
    assert first["kinds"] == second["kinds"] == ["ndarray", "ndarray"]
    assert first["untouched"] and second["untouched"]
    # rank 0 holds 0..3 and sends (0), (1 2 3); rank 1 holds 100..104 and sends (100 101), (102 103 104)
    assert first["y"] == [0, 100, 101]
    assert second["y"] == [1, 2, 3, 102, 103, 104]
    # the receiver's factor (1 on rank 0, 2 on rank 1) comes back to each row
    assert first["gradient"] == [1, 2, 2, 2]
    assert second["gradient"] == [1, 1, 2, 2, 2]


def test_megatrons_flops_are_ours(ranks):
    counted, expected = ranks(1).run(cases.flops, pattern="M-P-W-")[0]
    assert counted == expected > 0


def test_a_model_on_the_meta_device_has_every_parameter_and_no_memory(ranks):
    found = ranks(1).run(cases.on_meta, pattern="M-*-W-P-MEG-")[0]
    assert found["devices"] == ["meta"]
    assert found["parameters"] == found["expected"]
    assert found["afterwards"] == ["cpu", "cpu"]


def _samples(tokens: list[int]) -> dict[str, list]:
    """The batch of engine_cases.batch at these positions."""
    return {
        "tokens": [tokens],
        "labels": [[t + 1 for t in tokens]],
        "loss_mask": [[float(t % 3 != 0) for t in tokens]],
        "position_ids": [tokens],
        "documents": None,
    }


def test_tensor_parallel_ranks_get_one_readers_batch(ranks):
    flags = "--tensor-model-parallel-size 2 --sequence-parallel"
    assert ranks(2).run(cases.batch, pattern="M-", flags=flags) == [_samples(list(range(32)))] * 2


def test_context_parallel_ranks_get_their_zigzag_chunks(ranks):
    first, second = ranks(2).run(cases.batch, pattern="M-", flags="--context-parallel-size 2")
    assert first == _samples([*range(8), *range(24, 32)])
    assert second == _samples([*range(8, 24)])


def test_pipeline_stages_get_what_they_use(ranks):
    whole = _samples(list(range(32)))
    first, last = ranks(2).run(cases.batch, pattern="M-|M-", flags="--pipeline-model-parallel-size 2")
    assert first == {**whole, "labels": None, "loss_mask": None}
    assert last == {**whole, "tokens": None, "position_ids": None}


@pytest.mark.parametrize(
    "flags",
    [
        "--pipeline-model-parallel-size 4",
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ],
)
def test_every_rank_of_every_stage_gets_the_documents_of_whole_samples(ranks, flags):
    pattern = "M-|M-|M-|M-" if "size 4" in flags else "M-"
    found = ranks(4).run(cases.batch, pattern=pattern, flags=f"{flags} --reset-attention-mask", eod_at=(4, 5, 31))
    assert [batch["documents"] for batch in found] == [[[0] * 5 + [1] + [2] * 26]] * 4
    if "size 4" in flags:
        assert all(batch["tokens"] is batch["labels"] is None for batch in found[1:3])


# The command line, in a process that has imported Megatron already -----------------------------------

MOE = "--num-experts 4 --moe-router-topk 1 --moe-ffn-hidden-size 24"
REFUSED = [
    ("M-*- --nonsense 3", ["unrecognized arguments: --nonsense 3", "--help"]),
    ("M-*- --swa-windw 3", ["--swa-windw", "Did you mean --swa-window"]),
    ("M-*- --lr fast", ["--lr", "'fast'"]),
    ("M-*- --ffn sparse", ["--ffn", "'sparse'", "moe"]),
    ("M-*- --tensor-model-parallel-size 2", ["1 processes", "multiple of 2", "torchrun"]),
    ("MEM- --expert-model-parallel-size 2 " + MOE, ["1 processes", "multiple of 2", "expert 2"]),
    ("M-*- --tensor-model-parallel-size 0", ["--tensor-model-parallel-size is 0"]),
    ("M-*- --num-attention-heads 5", ["--hidden-size is 32", "--num-attention-heads", "5"]),
    ("M-*- --num-query-groups 3", ["--num-attention-heads is 4", "--num-query-groups", "3"]),
    ("M- --mamba-num-groups 3", ["--mamba-num-heads is 8", "--mamba-num-groups", "3"]),
    ("P- --intra-qk-dim 17", ["--intra-qk-dim is 17"]),
    ("G- --linear-num-key-heads 3", ["--linear-num-value-heads is 4", "3"]),
    ("ME", ["E layers", "--num-experts"]),
    ("W- --swa-window 0", ["--swa-window 0"]),
    ("M- --peak-tflops 0", ["--peak-tflops is 0", "such as 989"]),
    ("M- --mamba-a-init-range 2.0 1.0", ["--mamba-a-init-range 2.0 1.0", "low <= high"]),
    ("*- --kv-channels 7", ["even number", "--kv-channels"]),
    ("*- --position-embedding-type yarn", ["--position-embedding-type yarn", "rope"]),
    ("*- --position-embedding-type learned_absolute", ["learned_absolute", "rope"]),
    ("*- --position-embedding-type none", ["--use-rope-scaling", "no RoPE"]),
    ("G- --reset-attention-mask", ["--reset-attention-mask", "G layers", "M layers"]),
    ("M- --reset-attention-mask --disable-mamba-mem-eff-path", ["--disable-mamba-mem-eff-path", "drop it"]),
    ("*- --reset-position-ids", ["--reset-position-ids", "Add --reset-attention-mask"]),
    ("M-*- --balance-pipeline 2 --num-attention-heads 0", ["--num-attention-heads is 0", "at least 1"]),
    ("M-*- --balance-pipeline 5", ["5 pipeline segments of 4 layers"]),
    ("*- --softmax-type learnable", ["--softmax-type learnable", "Drop it"]),
    ("*- --normalization LayerNorm", ["--normalization LayerNorm", "RMSNorm"]),
    ("*- --fp8-format hybrid", ["--fp8-format", "--backend te"]),
    ("*- --backend te", ["--backend te", "CUDA", "--backend torch"]),
    ("*- --device cuda", ["--device cuda", "--device cpu"]),
    ("*- --distributed-backend nccl", ["nccl", "gloo"]),
    ("*- --cuda-graph-impl local", ["--cuda-graph-impl", "CUDA device"]),
    ("*- --optimizer-cuda-graph", ["--optimizer-cuda-graph", "CUDA device"]),
    ("*- --max-skipped-steps -1", ["--max-skipped-steps is -1", "at least 0"]),
    ("*- --spike-threshold 1", ["--spike-threshold is 1", "above 1"]),
    ("*- --on-bad-step skip --fp16", ["--on-bad-step skip", "--fp16", "loss scaling", "Drop one"]),
    ("*- --on-bad-step wait", ["invalid choice: 'wait'"]),
    ("*- --rerun-mode report_stats", ["--rerun-mode report_stats", "Drop it"]),
    ("*- --global-batch-size 0", ["Megatron refuses", "global_batch_size > 0"]),
    ("*- --data-path nowhere/text", ["nowhere/text.idx", "preprocess_data.py"]),
    ("*- --tokenizer-type SentencePieceTokenizer --tokenizer-model nowhere", ["--tokenizer-model nowhere"]),
]


def _is_one_paragraph(code: int, out: str, errors: str) -> bool:
    out = "" if "Megatron refuses" in errors else out  # upstream prints its layout before it checks
    return code == 2 and not out and errors.startswith("error: ") and "\n\n" not in errors and len(errors) < 900


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_mistake_is_one_paragraph_and_exit_code_2(ranks, line, words):
    pattern, _, flags = line.partition(" ")
    code, out, errors = ranks(1).run(
        cases.program, line=f"--hybrid-layer-pattern {pattern} {flags}", mock="--data-path" not in flags
    )[0]
    assert _is_one_paragraph(code, out, errors), errors
    for word in words:
        assert word in errors


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    """A folder with a data set of bytes, two blends that name it, and a SentencePiece model."""
    import sentencepiece

    where = tmp_path_factory.mktemp("bytes")
    texts = [f"document {n} of a small corpus" for n in range(100)]
    prefix = preprocess([write(where / "corpus.jsonl", texts)], where / "corpus", append_eod=True).prefixes[0]
    for name, epochs in (("half", 0.5), ("often", 1000)):
        entry = {"name": "small", "path": prefix.name, "epochs": epochs}
        (where / f"{name}.yaml").write_text(json.dumps({"sources": [entry]}))  # JSON is YAML
    with (where / "sp.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=stream,
            vocab_size=40,
            hard_vocab_limit=False,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return where


NULL = "--vocab-size 258"
PIECES = "--tokenizer-type SentencePieceTokenizer --tokenizer-model {0}/sp.model"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--data-path {0}/corpus_text_document " + PIECES, ["another tokenizer", "ByteTokenizer", "sp.model ("]),
        (
            "--train-data-path {0}/corpus_text_document --eval-iters 0",
            ["--vocab-size 64 is too small", "Give --vocab-size 258"],
        ),
        (f"--data-blend {{0}}/often.yaml --reset-attention-mask {PIECES}", ["another tokenizer", "corpus_text_doc"]),
        (f"--data-blend {{0}}/half.yaml {NULL}", ["small: 2,560 of them (100%) out of", "0.5 are allowed", "or fewer"]),
        ("--data-blend {0}/often.yaml --vocab-size 300 --reset-attention-mask", ["token 299", "token 257"]),
        (
            "--data-path {0}/corpus_text_document --split 98,1.9,0.1",
            ["100 sequences", "none for test", "--split 90,10,0"],
        ),
        ("--data-blend {0}/none.yaml", ["none.yaml: there is no such file"]),
    ],
)
def test_data_that_do_not_fit_the_run(ranks, of_bytes, line, words):
    split = "" if "--train-data-path" in line else "--split 97,2,1"
    flags = f"--hybrid-layer-pattern M- {split} {line}".format(of_bytes)
    code, out, errors = ranks(1).run(cases.program, line=flags, mock=False)[0]
    if "half" in line:  # how long the run is follows from Megatron's checks, which begin with a list of all flags
        out = ""
    assert _is_one_paragraph(code, out, errors), errors
    for word in words:
        assert word in errors


def test_print_config_shows_the_blend(ranks, of_bytes):
    line = f"--hybrid-layer-pattern M- --data-blend {of_bytes}/often.yaml {NULL} --split 97,2,1 --print-config"
    code, out, errors = ranks(1).run(cases.program, line=line, mock=False)[0]
    assert (code, errors) == (0, "")
    data = next(part.splitlines() for part in out.split("\n\n") if part.startswith("data\n"))
    available = sum(len(f"document {n} of a small corpus") + 1 for n in range(97))
    assert data[2].split() == ["small", "1.0000", f"{available:,}", "2,560", f"{2560 / available:.2f}", "1000"]
    assert f"  --data-path {of_bytes}/corpus_text_document\n" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--hybrid-layer-pattern M-", ["--hidden-size is not given", "--recipe"]),
        ("--recipe demo --expert-model-parallel-size 1", ["no data", "--data-path", "--mock-data"]),
        ("--recipe demo --expert-model-parallel-size 1 --mock-data", ["no tokenizer", "--tokenizer-type"]),
        (
            "--recipe demo --expert-model-parallel-size 1 --mock-data --tokenizer-type NullTokenizer",
            ["--vocab-size"],
        ),
    ],
)
def test_what_a_run_needs_is_named(ranks, line, words):
    code, out, errors = ranks(1).run(cases.program, line=line, sizes=False)[0]
    assert _is_one_paragraph(code, out, errors), errors
    for word in words:
        assert word in errors


@pytest.mark.parametrize(
    ("pattern", "flags", "words"),
    [
        ("M-*-", "--tensor-model-parallel-size 2 --num-attention-heads 1 --num-query-groups 1", ["multiple of"]),
        ("M-", "--tensor-model-parallel-size 2 --mamba-num-groups 3 --mamba-num-heads 6", ["is 3", "must divide"]),
        (
            "P-",
            "--tensor-model-parallel-size 2 --intra-ssm-dim 24 --mamba-num-groups 1",
            ["heads of P layers", "is 3", "multiple of"],
        ),
        ("ME", f"--tensor-model-parallel-size 2 {MOE}", ["--sequence-parallel"]),
        ("M-", "--context-parallel-size 2 --mamba-num-heads 5 --mamba-num-groups 1", ["5 Mamba heads"]),
        ("G-", "--context-parallel-size 2 --linear-num-key-heads 1", ["--linear-num-key-heads is 1", "context"]),
        ("ME", f"--expert-model-parallel-size 2 {MOE} --num-experts 3", ["--num-experts is 3"]),
    ],
)
def test_a_layout_that_the_sizes_do_not_divide_into(ranks, pattern, flags, words):
    found = ranks(2).run(cases.program, line=f"--hybrid-layer-pattern {pattern} {flags}")
    code, out, errors = found[0]
    assert _is_one_paragraph(code, out, errors), errors
    for word in words:
        assert word in errors
    assert found[1] == (2, "", errors.replace("error:", "error on rank 1:", 1))  # after giving way to the first


def test_a_checkpoint_of_other_layers_is_refused_and_other_stages_are_not(ranks, tmp_path):
    where = folder(tmp_path / "checkpoint")
    ranks(1).run(initial_checkpoint, pattern="M-*-", folder=where, flags="--verify-integrity")
    code, out, errors = ranks(1).run(cases.program, line=f"--hybrid-layer-pattern M-W- --load {where}")[0]
    assert _is_one_paragraph(code, "", errors), errors
    for word in (where, "M-*-", "M-W-", "--load"):
        assert word in errors
    for pattern, error in (("M-*-", False), ("M-|*-", False), ("M|-*|-", False), ("M-*-M-", True)):
        assert bool(ranks(1).run(cases.check_checkpoint, load=where, pattern=pattern)[0]) == error, pattern
    empty = folder(tmp_path / "empty")
    assert ranks(1).run(cases.check_checkpoint, load=empty, pattern="M-")[0] == ""


def test_print_config_describes_the_run(ranks, tmp_path):
    code, out, errors = ranks(1).run(cases.program, line="--recipe demo --print-config --lr 0.5", sizes=False)[0]
    assert (code, errors) == (0, "")
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert rows["pattern"] == "M-M-P-ME*-ME"
    assert "without embeddings" in rows["parameters"]
    assert rows["layout"].startswith("2 processes") and "expert 2" in rows["layout"]
    assert "  --lr 0.5\n" in out and "--hybrid-layer-pattern=M-M-P-ME*-ME" in out
    known = ranks(1).run(cases.program, line="--recipe demo --print-config --vocab-size 4096", sizes=False)[0][1]
    # 4096 x 128 embeddings, tied; they are what the other line left out
    assert "524,288 in embeddings" in known
    first, second = (int(re.search(r"parameters +([\d,]+)", text)[1].replace(",", "")) for text in (out, known))
    assert second - first == 4096 * 128
    # a tokenizer that is at hand knows better
    bpe = train_bpe(["some words"] * 9, 268, tmp_path / "bpe", bos_token="<b>", pad_token="<p>")
    line = (
        f"--recipe demo --print-config --vocab-size 4096 --tokenizer-type HuggingFaceTokenizer --tokenizer-model {bpe}"
    )
    assert f"{384 * 128:,} in embeddings" in ranks(1).run(cases.program, line=line, sizes=False)[0][1]


def test_help_shows_our_flags_with_their_docstrings(ranks):
    code, out, _ = ranks(1).run(cases.program, line="--help", sizes=False)[0]
    assert code == 0
    assert out.startswith("usage: pretrain_hybrid.py --list-recipes")
    assert len(out.split("\n\n")[0]) < 400
    words = " ".join(out.split())
    for text in ("--swa-window SWA_WINDOW W layers: tokens that a query sees", "--tensor-model-parallel-size"):
        assert text in words
