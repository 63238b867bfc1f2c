"""The command line in a process that has imported Megatron already: mistakes, --print-config, --help."""

import json
import re

import pytest

from tests.data.corpora import preprocess, train_bpe, write
from tests.support.program import is_one_paragraph, program

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
    ("*- --loss-kernel fused --fp16", ["--loss-kernel fused", "--fp16", "Drop one"]),
    ("*- --loss-kernel fused --cross-entropy-loss-fusion", ["--loss-kernel fused", "another kernel"]),
    ("*- --normalization LayerNorm", ["--normalization LayerNorm", "RMSNorm"]),
    ("*- --fp8-format hybrid", ["--fp8-format", "--backend te"]),
    ("*- --backend te", ["--backend te", "CUDA", "--backend torch"]),
    ("M- --ssm-kernels triton", ["--ssm-kernels triton", "needs a CUDA device", "use torch"]),
    ("M- --ssm-kernels mamba_ssm", ["--ssm-kernels mamba_ssm", "needs a CUDA device"]),
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


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_mistake_is_one_paragraph_and_exit_code_2(ranks, line, words):
    pattern, _, flags = line.partition(" ")
    code, out, errors = ranks(1).run(
        program, line=f"--hybrid-layer-pattern {pattern} {flags}", mock="--data-path" not in flags
    )[0]
    assert is_one_paragraph(code, out, errors), errors
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
    code, out, errors = ranks(1).run(program, line=flags, mock=False)[0]
    if "half" in line:  # how long the run is follows from Megatron's checks, which begin with a list of all flags
        out = ""
    assert is_one_paragraph(code, out, errors), errors
    for word in words:
        assert word in errors


def test_print_config_shows_the_blend(ranks, of_bytes):
    line = f"--hybrid-layer-pattern M- --data-blend {of_bytes}/often.yaml {NULL} --split 97,2,1 --print-config"
    code, out, errors = ranks(1).run(program, line=line, mock=False)[0]
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
    code, out, errors = ranks(1).run(program, line=line, sizes=False)[0]
    assert is_one_paragraph(code, out, errors), errors
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
    found = ranks(2).run(program, line=f"--hybrid-layer-pattern {pattern} {flags}")
    code, out, errors = found[0]
    assert is_one_paragraph(code, out, errors), errors
    for word in words:
        assert word in errors
    assert found[1] == (2, "", errors.replace("error:", "error on rank 1:", 1))  # after giving way to the first


def test_print_config_describes_the_run(ranks, tmp_path):
    code, out, errors = ranks(1).run(program, line="--recipe demo --print-config --lr 0.5", sizes=False)[0]
    assert (code, errors) == (0, "")
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert rows["pattern"] == "M-M-P-ME*-ME"
    assert "without embeddings" in rows["parameters"]
    assert rows["layout"].startswith("2 processes") and "expert 2" in rows["layout"]
    assert (rows["backend"], rows["Mamba-2 kernels"]) == ("torch on cpu", "torch")
    assert "  --lr 0.5\n" in out and "--hybrid-layer-pattern=M-M-P-ME*-ME" in out
    known = ranks(1).run(program, line="--recipe demo --print-config --vocab-size 4096", sizes=False)[0][1]
    # 4096 x 128 embeddings, tied; they are what the other line left out
    assert "524,288 in embeddings" in known
    first, second = (int(re.search(r"parameters +([\d,]+)", text)[1].replace(",", "")) for text in (out, known))
    assert second - first == 4096 * 128
    # a tokenizer that is at hand knows better
    bpe = train_bpe(["some words"] * 9, 268, tmp_path / "bpe", bos_token="<b>", pad_token="<p>")
    line = (
        f"--recipe demo --print-config --vocab-size 4096 --tokenizer-type HuggingFaceTokenizer --tokenizer-model {bpe}"
    )
    assert f"{384 * 128:,} in embeddings" in ranks(1).run(program, line=line, sizes=False)[0][1]


def test_help_shows_our_flags_with_their_docstrings(ranks):
    code, out, _ = ranks(1).run(program, line="--help", sizes=False)[0]
    assert code == 0
    assert out.startswith("usage: pretrain_hybrid.py --list-recipes")
    assert len(out.split("\n\n")[0]) < 400
    words = " ".join(out.split())
    for text in ("--swa-window SWA_WINDOW W layers: tokens that a query sees", "--tensor-model-parallel-size"):
        assert text in words
