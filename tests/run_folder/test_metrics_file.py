"""metrics.jsonl: what counts in it, reading it while it grows, and writing it whatever happens."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.run_folder.metrics_file import Appender, Balance, Follower, Metrics, balance, read_metrics


def step(iteration, loss):
    return {"iteration": iteration, "loss": loss, "tokens": 10 * iteration}


def validation(iteration, loss, name="validation"):
    return {"iteration": iteration, "validation_loss": loss, "validation": name}


def collected(*records):
    metrics = Metrics()
    for record in records:
        metrics.add(record)
    return metrics


def losses(metrics):
    return [(iteration, record["loss"]) for iteration, record in metrics.train.items()]


RUN = [{"resume": 0}, step(1, 5.0), step(2, 4.0), validation(2, 4.5), validation(2, 9.0, "test"), step(3, 3.0)]


def test_steps_that_were_never_redone_do_not_look_current():
    back = collected(*RUN, step(4, 2.0), validation(4, 2.5), {"resume": 2, "processes": 4})
    assert losses(back) == [(1, 5.0), (2, 4.0)]
    assert back.validation == {2: 4.5}
    assert [start["resume"] for start in back.starts] == [0, 2]


def test_the_last_record_of_an_iteration_counts_and_order_stays():
    again = collected(*RUN, {"resume": 1}, step(2, 4.1), validation(2, 4.6), step(3, 3.1), {"resume": 3}, step(4, 2.1))
    assert losses(again) == [(1, 5.0), (2, 4.1), (3, 3.1), (4, 2.1)]
    assert again.validation == {2: 4.6}


def test_a_step_that_goes_back_is_a_start_whose_record_is_missing():
    assert losses(collected(*RUN, step(2, 4.1))) == [(1, 5.0), (2, 4.1)]
    # the validation of the step before it stays; a repeated one of the same step replaces the first
    assert collected(*RUN, step(3, 3.1), validation(2, 4.4)).validation == {2: 4.4}


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    lines = [b'{"iteration": 1, "loss": 2.0}', b"noise", b"[1]", b'{"loss": 1}', b'{"iteration": true, "loss": 1}']
    lines += [b"\xff\xfe", b'{"iteration": 2, "lo{"iteration": 2, "loss": 1.5}', b'{"iteration": 3, "loss": NaN}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (first, second) = losses(read_metrics(tmp_path / "metrics.jsonl"))
    assert first == (1, 2.0) and second[0] == 3 and math.isnan(second[1])
    assert read_metrics(tmp_path / "none.jsonl") == Metrics()


def test_a_follower_reads_each_line_once_and_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path, keep=("loss",))
    assert list(follower.records()) == []
    whole = [json.dumps(step(i, float(i))) + "\n" for i in range(1, 4)]
    path.write_text(whole[0] + whole[1][:9])
    assert list(follower.records()) == [step(1, 1.0)]
    assert list(follower.records()) == []
    with path.open("a") as file:
        file.write(whole[1][9:] + whole[2])
    assert list(follower.records()) == [step(2, 2.0), step(3, 3.0)]
    assert follower.metrics.train == {1: {"loss": 1.0}, 2: {"loss": 2.0}, 3: {"loss": 3.0}}


@pytest.mark.parametrize("replace", [False, True], ids=["cut", "replaced"])
def test_a_follower_starts_over_in_another_file(tmp_path, replace):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(step(i, float(i))) + "\n" for i in (1, 2, 3)))
    follower = Follower(path)
    follower.update()
    text = "".join(json.dumps(step(i, 7.0)) + "\n" for i in (range(1, 9) if replace else [1]))
    if replace:  # as long as before and longer: its size tells nothing
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(path)
    else:
        path.write_text(text)
    follower.update()
    assert losses(follower.metrics) == [(i, 7.0) for i in (range(1, 9) if replace else [1])]


def test_a_record_behind_half_a_line_has_its_own(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    assert Appender(path).append(step(1, 5.0)) == ""
    with path.open("a") as file:
        file.write('{"iteration": 2, "lo')  # killed
    appender = Appender(path)
    appender.append(step(2, 4.0))
    appender.append(step(3, 3.0))
    assert losses(read_metrics(path)) == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert path.read_bytes().count(b"\n\n") == 0 and path.read_bytes().count(b"\n") == 4
    assert all(abs(r["time"] - os.path.getmtime(path)) < 60 for r in read_metrics(path).train.values())


FULL = """
import json, resource, signal, sys
from pathlib import Path
from megatron_hybrid.run_folder.metrics_file import Appender
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
appender = Appender(Path(sys.argv[1]))
said = [appender.append({"iteration": i, "loss": 1.0}) for i in (1, 2)]
resource.setrlimit(resource.RLIMIT_FSIZE, (Path(sys.argv[1]).stat().st_size + 20, resource.RLIM_INFINITY))
said += [appender.append({"iteration": i, "loss": 1.0}) for i in (3, 4, 5)]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
said += [appender.append({"iteration": i, "loss": 1.0}) for i in (6, 7)]
print(json.dumps(said))
"""


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path):
    """The system's own limit on a file's size: a write that takes a part, then writes that fail, then room again."""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [bool(text) for text in said] == [False, False, True, False, False, False, False]
    assert str(path) in said[2] and "Training continues" in said[2]
    assert list(read_metrics(path).train) == [1, 2, 6, 7]


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "file").write_text("")
    appender = Appender(tmp_path / "file" / "metrics.jsonl")
    assert os.strerror(errno.EEXIST) in appender.append(step(1, 1.0))
    assert appender.append(step(2, 1.0)) == ""


def test_the_balance_of_experts():
    assert balance([0.25] * 4) == Balance(1.0, pytest.approx(1.0))
    assert balance([1.0, 0.0, 0.0, 0.0]) == Balance(4.0, 0.0)
    # half of the tokens to each of two experts of four: twice the mean, and log 2 / log 4
    assert balance([0.5, 0.5, 0.0, 0.0]) == Balance(2.0, pytest.approx(0.5))
    assert balance([1.0]) == Balance(1.0, 1.0)


def test_loads_of_experts_are_those_of_the_last_interval_that_counts():
    def loads(iteration, *shares):
        return step(iteration, 1.0) | {"expert_loads": {"2": list(shares), "mtp 1.1": [0.5, 0.5]}}

    metrics = collected(loads(2, 0.5, 0.5), step(3, 1.0), loads(4, 0.25, 0.75))
    assert metrics.expert_loads == {"2": [0.25, 0.75], "mtp 1.1": [0.5, 0.5]}
    assert metrics.max_over_mean == {2: {"2": 1.0, "mtp 1.1": 1.0}, 4: {"2": 1.5, "mtp 1.1": 1.0}}
    assert "expert_loads" not in metrics.train[4]
    metrics.add({"resume": 3})
    assert (metrics.expert_loads, list(metrics.max_over_mean)) == ({}, [2])


def test_the_package_needs_the_standard_library_alone():
    code = "import sys, megatron_hybrid.run_folder.metrics_file; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "set()\n"
