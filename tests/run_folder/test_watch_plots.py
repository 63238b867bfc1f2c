"""Curves of runs: which records they show, and how they are scaled."""

import math

import pytest

from megatron_hybrid.run_folder import watch_plots
from tests.support.watched_runs import add, curves, step, watched, write_run


def test_the_last_record_of_an_iteration_counts(tmp_path):
    run = tmp_path / "run"
    add(run, {"resume": 0, "time": 1.0}, *(step(i, loss=9.0) for i in range(1, 41)))
    add(run, {"resume": 30, "time": 2.0}, *(step(i, loss=1.0) for i in range(31, 51)))
    drawn = watch_plots.plots(watched(run), None, 1000)
    assert [plot.title for plot in drawn] == ["loss (nats per token)", "gradient norm", "tokens per second"]
    loss = curves(drawn)["run"]
    assert loss.iterations == list(range(1, 51))
    assert loss.values == [9.0] * 30 + [1.0] * 20
    assert [plot.restarts for plot in drawn] == [[(0, 30)]] * 3


def test_restarts_outside_of_what_is_shown_are_left_out(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for start in (0, 10, 10, 20, 30):  # started twice from 10; the last start has no step yet
        add(run, {"resume": start, "time": 1.0}, *(step(i) for i in range(start + 1, start + 11) if start < 30))
    write_run(other)
    assert {place for plot in watch_plots.plots(watched(run), None, 100) for place in plot.restarts} == {
        (0, 10),
        (0, 20),
    }
    assert watch_plots.plots(watched(run), 12, 100)[0].restarts == [(0, 20)]
    assert watch_plots.plots(watched(other, run), None, 100)[0].restarts == [(1, 10), (1, 20), (1, 30)]


def test_long_curves_are_thinned_to_means(tmp_path):
    add(tmp_path, *(step(i, loss=float(i)) for i in range(1, 1004)))
    add(tmp_path, *({"iteration": i, "validation_loss": 1.0} for i in range(1, 1004)))
    found = curves(watch_plots.plots(watched(tmp_path), None, 100))
    assert all(len(curve.values) == 1 for curve in curves(watch_plots.plots(watched(tmp_path), None, 1)).values())
    loss, validation = found[tmp_path.name], found[f"{tmp_path.name} validation"]
    assert loss.iterations == [*range(11, 1004, 11), 1003]
    assert loss.values[:2] == [6.0, 17.0] and loss.values[-1] == pytest.approx(sum(range(1002, 1004)) / 2)
    assert len(validation.values) <= 12 and validation.iterations[-1] == 1003
    short = curves(watch_plots.plots(watched(tmp_path), 100, 100))[tmp_path.name]
    assert short.iterations == list(range(904, 1004)) and short.values == [float(i) for i in range(904, 1004)]


def test_values_that_are_not_finite_are_left_out(tmp_path):
    add(tmp_path, step(1), step(2, loss=math.nan, grad_norm=None), step(3, grad_norm=math.inf), step(4))
    loss, norm = watch_plots.plots(watched(tmp_path), None, 100)[:2]
    assert loss.curves[0].iterations == [1, 3, 4] and norm.curves[0].iterations == [1, 4]


def test_last_counts_from_the_run_that_is_least_far(tmp_path):
    runs = watched(write_run(tmp_path / "long", 60), write_run(tmp_path / "short", 40))
    found = curves(watch_plots.plots(runs, 10, 100))
    assert {name: curve.iterations[0] for name, curve in found.items() if " " not in name} == {"long": 31, "short": 31}
    assert found["long"].iterations[-1] == 60 and found["long validation"].iterations == [40, 60]


def test_experts_are_drawn_of_the_worst_layer(tmp_path):
    loads = {"3": [0.25] * 4, "7": [0.7, 0.1, 0.1, 0.1]}
    plot = watch_plots.plots(watched(write_run(tmp_path, 3, loads=loads)), None, 100)[-1]
    assert plot.title.startswith("busiest expert") and plot.curves[0].values == pytest.approx([2.8] * 3)


def limits_of(values):
    return watch_plots.limits([watch_plots.Curve("a", 0, list(range(len(values))), values)])


def test_limits_hold_all_but_spikes_that_flatten_the_rest():
    calm = [1.0 + i / 100 for i in range(100)]
    assert limits_of(calm) == pytest.approx((0.9505, 2.0395))
    low, high = limits_of([*calm, 500.0])
    assert low < 1.0 and 1.99 < high < 2.5
    assert limits_of([*calm, 3.0])[1] > 3.0, "one that leaves the rest visible is shown"
    assert limits_of([5.0, 400.0])[1] > 400, "of few values all are shown"
    for constant in (0.0, 3.0, -2.0):
        low, high = limits_of([constant] * 5)
        assert low < constant < high


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        ((-0.2, 5.1, 2), ["0", "5"]),
        ((-0.2, 5.1, 3), ["0", "2", "4"]),
        ((1, 60, 3), ["20", "40", "60"]),
        ((100_001, 120_000, 2), ["110,000", "120,000"]),
        ((640, 1260, 3, True), ["0.8 k", "1.0 k", "1.2 k"]),
        ((1.2971e6, 1.3021e6, 3, True), ["1.298 M", "1.300 M", "1.302 M"]),
        ((0.0009, 0.0021, 2), ["0.001", "0.002"]),
        ((-1.0, 1.0, 3), ["-1", "0", "1"]),
    ],
)
def test_ticks_are_round_and_told_apart(axis, labels):
    places, found = watch_plots.ticks(*axis)
    assert found == labels
    assert all(axis[0] <= place <= axis[1] for place in places) and places == sorted(places)
