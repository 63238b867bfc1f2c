"""Text and pictures of plans."""

import pytest

from megatron_hybrid.plan import comparison, plots, tables
from megatron_hybrid.plan.figures import figures
from megatron_hybrid.plan.subject import Where
from tests.plan.support import DEMO, PAPER, fitted, machine, planned, printed, small


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
