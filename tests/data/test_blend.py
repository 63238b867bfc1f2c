"""Blends: what a file may say, how shares and passes follow, and that upstream draws what the table says."""

import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.cli import flags, report
from megatron_hybrid.data import blend
from megatron_hybrid.data.blend import Length, Source
from megatron_hybrid.data.indexed import IndexedWriter, dtype_for

PAIR = "sources: [{name: web, path: web, weight: 3}, {name: code, path: code, weight: 1}]"
SIZES = {"web": (400, 1), "code": (90, 1000)}
"""Documents of each data set, and its first token; the second data set's lengths differ."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with two data sets, whose tokens say which of them they are from."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(5)
    for name, (documents, first) in SIZES.items():
        with IndexedWriter(folder, name, dtype_for(2000)) as writer:
            lengths = generator.integers(3, 60 if name == "web" else 200, documents)
            writer.add(generator.integers(first, first + 900, lengths.sum()).astype(np.uint16), lengths)
            writer.finish()
    return folder


def write(folder: Path, text: str) -> Path:
    file = folder / "blend.yaml"
    file.write_text(text)
    return file


def lengths_of(folder: Path, name: str) -> np.ndarray:
    return np.fromfile(folder / f"{name}.idx", np.int32, SIZES[name][0], offset=34)


def test_a_file_gives_weights_and_prefixes_from_its_own_folder(data):
    file = write(data, PAIR)
    assert blend.data_path(file, "1") == ["0.75", str(data / "web"), "0.25", str(data / "code")]
    single = write(data, "sources: [{name: web, path: web, weight: 7}]")
    assert blend.data_path(single, "1") == [str(data / "web")]
    absolute = write(data, f"sources: [{{name: a, path: {data}/code, epochs: 1e-3}}]")  # a text in YAML 1.1
    assert blend.read_blend(absolute) == [Source("a", str(data / "code"), None, 1e-3)]


def test_epochs_alone_weigh_by_tokens(data):
    file = write(data, "sources: [{name: web, path: web, epochs: 1}, {name: code, path: code, epochs: 3.5}]")
    web, code = (int(lengths_of(data, name).sum()) for name in SIZES)
    words = blend.data_path(file, "1")
    assert float(words[0]) == pytest.approx(web / (web + 3.5 * code), rel=1e-12)
    # a run of exactly that length, and one of half of it
    for part in (1.0, 0.5):
        length = Length("--train-samples", round(part * (2 * web + 7 * code)), 1)
        drawn = blend.draws(blend.read_blend(file), "1", length)
        assert [d.epochs for d in drawn] == pytest.approx([2 * part, 7 * part], rel=1e-3)
    with pytest.raises(ValueError, match="code: .* are 7 epochs, and 3.5 are allowed"):
        length = Length("--train-samples", 2 * web + 7 * code, 1)
        blend.check_epochs("b.yaml", blend.draws(blend.read_blend(file), "1", length), length)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sources: []", ["no sources"]),
        ("- name: web", ["no sources", "`sources:`"]),
        ("sources: [{name: web", ["is not YAML", "line 1"]),
        (PAIR + "\nseed: 1", ["unknown key seed", "drop it"]),
        ("sources: [web]", ["source 1 is 'web'", "name, path"]),
        ("sources: [{path: web, weight: 1}]", ["source 1: name is missing"]),
        ("sources: [{name: 2024, path: web, weight: 1}]", ["source 2024: name is 2024", "quotes"]),
        ("sources: [{name: web, weight: 1}]", ["source web: path is missing"]),
        ("sources: [{name: web, path: web, wieght: 1}]", ["source web: unknown key wieght", "weight"]),
        ("sources: [{name: web, path: web, weight: 0}]", ["source web: weight is 0", "above 0"]),
        ("sources: [{name: web, path: web, weight: -1.5}]", ["weight is -1.5"]),
        ("sources: [{name: web, path: web, weight: much}]", ["weight is 'much'"]),
        ("sources: [{name: web, path: web, weight: true}]", ["weight is True"]),
        ("sources: [{name: web, path: web, weight: .inf}]", ["weight is inf"]),
        ("sources: [{name: web, path: web, weight: 1, epochs: 0}]", ["source web: epochs is 0", "above 0"]),
        ("sources: [{name: web, path: web}]", ["source web: neither weight nor epochs"]),
        (PAIR.replace("name: code", "name: web"), ["the name web", "rename"]),
        (PAIR.replace("path: code", "path: web"), ["the path", "web"]),
        (PAIR.replace("code, weight: 1", "code, epochs: 1"), ["but not code", "all of them a weight"]),
        (PAIR.replace("path: code", "path: cod"), ["source code: there is no", "cod.idx", "without the extension"]),
    ],
)
def test_a_wrong_file_is_refused_by_the_sources_name(data, text, words):
    file = write(data, text)
    with pytest.raises(ValueError) as error:
        blend.read_blend(file)
    for word in (f"--data-blend {file}", *words):
        assert word in str(error.value)


def test_a_missing_file_and_an_empty_train_part(data):
    with pytest.raises(ValueError, match="there is no such file"):
        blend.read_blend(data / "none.yaml")
    for split in ("0,1,1", "none", "1.2.3", "1,1,1,1"):
        with pytest.raises(ValueError, match="leaves nothing to train on"):
            blend.split_fractions(split)
    with pytest.raises(ValueError, match="code has 90 sequences, of which --split 1,999 leaves no token"):
        blend.train_tokens(str(data / "code"), "1,999")


def test_one_data_set_under_two_names_is_refused(data, tmp_path):
    """Else a limit of two epochs on each would let a run pass over it four times."""
    for end in (".bin", ".idx"):
        (tmp_path / f"copied{end}").write_bytes((data / f"web{end}").read_bytes())
        (tmp_path / f"soft{end}").symlink_to(data / f"web{end}")
        (tmp_path / f"hard{end}").hardlink_to(data / f"web{end}")
    for path in (tmp_path / "copied", tmp_path / "soft", tmp_path / "hard", data / ".." / data.name / "web"):
        file = write(data, f"sources: [{{name: a, path: web, epochs: 2}}, {{name: b, path: {path}, epochs: 2}}]")
        with pytest.raises(ValueError, match=rf"the sources a \({data}/web\) and b \({path}\) are the same data"):
            blend.read_blend(file)


def test_a_part_without_sequences_is_refused(data):
    code = str(data / "code")  # 90 sequences, of which upstream's default split leaves none to the test
    for split, part in (("969,30,1", "test"), ("99,0.1,0.9", "validation"), ("1,500,500", "training")):
        with pytest.raises(ValueError, match=f"code has 90 sequences, of which --split {split} leaves none for {part}"):
            blend.check_parts(code, split)
    for split in ("96.9,3,0", "1", "90,9,1", "1,0,90"):
        blend.check_parts(code, split)
    with IndexedWriter(data, "hollow", dtype_for(9)) as writer:  # a part without tokens would be counted for ever, too
        writer.add(np.ones(8, np.uint16), np.array([8, 0]))
        writer.finish()
    with pytest.raises(ValueError, match="leaves empty ones alone for validation"):
        blend.check_parts(str(data / "hollow"), "1,1")


def test_a_run_that_repeats_too_much_is_refused_with_the_longest_that_does_not(data):
    file = write(data, PAIR.replace("weight: 1", "weight: 1, epochs: 2"))
    code = int(lengths_of(data, "code").sum())
    drawn = blend.draws(blend.read_blend(file), "1", long := Length("--train-iters", 10_000, 64))
    with pytest.raises(ValueError) as error:
        blend.check_epochs("b.yaml", drawn, long)
    text = str(error.value)
    assert "640,000 tokens (--train-iters 10000)" in text and "web:" not in text
    assert f"code: 160,000 of them (25%) out of {code:,} are {160_000 / code:.4g} epochs, and 2 are allowed" in text
    most = int(re.search(r"--train-iters (\d+) or fewer", text)[1])
    for steps, refused in ((most, False), (most + 1, True)):
        length = Length("--train-iters", steps, 64)
        again = blend.draws(blend.read_blend(file), "1", length)
        assert (again[1].epochs > 2) == refused
        if refused:
            with pytest.raises(ValueError):
                blend.check_epochs("b.yaml", again, length)
        else:
            blend.check_epochs("b.yaml", again, length)
    with pytest.raises(ValueError, match="--train-samples"):
        blend.check_epochs("b.yaml", blend.draws(blend.read_blend(file), "1", None), None)


def test_the_table_shows_each_source(data):
    length = Length("--train-iters", 100, 64)
    file = write(data, PAIR.replace("weight: 1", "weight: 1, epochs: 2"))
    web, code = (int(lengths_of(data, name).sum()) for name in SIZES)
    rows = [line.split() for line in blend.table(blend.draws(blend.read_blend(file), "1", length))]
    assert rows == [
        ["source", "weight", "available", "drawn", "epochs", "allowed"],
        ["web", "0.7500", f"{web:,}", "4,800", f"{4800 / web:.2f}", "any"],
        ["code", "0.2500", f"{code:,}", "1,600", f"{1600 / code:.2f}", "2"],
        ["all", "1.0000", f"{web + code:,}", "6,400"],
    ]
    unknown = blend.table(blend.draws(blend.read_blend(file), "1", None))
    assert unknown[1].split()[3:] == ["-", "-", "any"]


def test_plain_data_paths_have_a_table_too(data):
    def found(*words: str, **more) -> list[tuple[str, float, float | None]]:
        args = {"data_path": list(words), "data_blend": None, "split": "1", "rank": 0, "mock_data": False}
        args |= {"skip_train": False, "train_samples": None, "train_iters": 10, "step_batch_size_schedule": None}
        args |= {"global_batch_size": 4, "seq_length": 8}
        return [(d.name, d.share, d.drawn) for d in report.data_draws(Namespace(**(args | more)))]

    web, code = str(data / "web"), str(data / "code")
    assert found(web) == [("web", 1.0, 320.0)]
    assert found("30", web, "10", code) == [("web", 0.75, 240.0), ("code", 0.25, 80.0)]
    assert found("30", web, "0", code) == [("web", 1.0, 320.0)]
    assert found(web, train_iters=None, train_samples=3) == [("web", 1.0, 24.0)]
    assert found(web, step_batch_size_schedule="0:4") == [("web", 1.0, None)]
    assert found(web, code) == found(str(data / "none")) == found(web, rank=1) == []


def test_the_command_line_gets_megatrons_flag(data):
    file = write(data, PAIR)
    argv = flags.resolve(f"--hybrid-layer-pattern M- --data-blend {file}".split()).argv
    at = argv.index("--data-path")
    assert argv[at + 1 : at + 5] == ["0.75", str(data / "web"), "0.25", str(data / "code")]
    assert argv[at + 5].startswith("--") and ["--data-blend", str(file)] == argv[:2]
    for other in (f"--data-path {data}/web", "--train-data-path=x", "--mock-data"):
        with pytest.raises(ValueError, match=f"Both --data-blend and {other.replace('=', ' ').split()[0]} are given"):
            flags.resolve(f"--hybrid-layer-pattern M- --data-blend {file} {other}".split())
    by_epochs = write(data, "sources: [{name: w, path: web, epochs: 1}, {name: c, path: code, epochs: 1}]")
    shares = []
    for split in ("", "--split 1,9"):
        argv = flags.resolve(f"--hybrid-layer-pattern M- --data-blend {by_epochs} {split}".split()).argv
        shares.append(float(argv[argv.index("--data-path") + 1]))
    expected = [
        (web := lengths_of(data, "web")[:w].sum()) / (web + lengths_of(data, "code")[:c].sum())
        for w, c in ((388, 87), (40, 9))  # 0.969 of 400 and of 90, rounded, and a tenth
    ]
    assert shares == pytest.approx(expected, rel=1e-12)


class Tokenizer:
    """All that upstream's data sets ask of a tokenizer."""

    eod, pad, pad_id, vocab_size = 1999, -1, -1, 2000
    unique_identifiers = {"class": "test"}


@pytest.mark.parametrize("split", ["80,10,10", "1,0,0"])
def test_upstream_draws_the_shares_and_passes_of_the_table(data, tmp_path, split):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    samples, seq_length = 1500, 32
    file = write(data, PAIR)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        blend=get_blend_from_list(blend.data_path(file, split)),
        split=split,
        path_to_cache=str(tmp_path),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
    drawn = blend.draws(blend.read_blend(file), split, Length("--train-samples", samples, seq_length))

    # the train part ends where upstream's does
    for draw, dataset in zip(drawn, train.datasets, strict=True):
        assert draw.available == int(dataset.dataset.sequence_lengths[dataset.indices].sum())
    # each sample's tokens are of one data set; those of the second start at 1000
    from_code = np.array([int(train[i]["tokens"].min()) >= 1000 for i in range(samples)])
    tokens = np.array([(~from_code).sum(), from_code.sum()]) * seq_length
    assert tokens == pytest.approx([draw.drawn for draw in drawn], rel=0.01)
    # and a pass is a pass: where the table says n.m epochs, upstream has begun n + 1 (0.5% more in reserve)
    for draw, dataset in zip(drawn, train.datasets, strict=True):
        assert len(dataset.document_index) / len(dataset.indices) == np.ceil(1.005 * draw.epochs)
