"""tools/watch_run.py: in a terminal, live on one, and as PNG."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from megatron_hybrid.run_folder import watch, watch_plots
from megatron_hybrid.run_folder.progress import Progress
from megatron_hybrid.run_folder.state import State, write_state
from tests.support.watched_runs import ENVIRONMENT, ROOT, TOOL, add, plain, step, tool, watched, write_run

# --- start and mistakes ------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", *TOOL[1:], "--help"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--every SECONDS" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert {"megatron_hybrid.run_folder.watch_plots", "xxhash"} <= loaded
    assert not {name.split(".")[0] for name in loaded} & {"torch", "megatron", "numpy", "matplotlib", "plotext", "rich"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tmp}/none", "none is not a directory; give the --save directory of a run."),
        ("{tmp}/run {tmp}/none", "none is not a directory"),
        ("{tmp}/empty", "empty/metrics.jsonl has no training record yet; look again after some iterations."),
        ("{tmp}/run --every 0", "--every 0: give seconds, above 0"),
        ("{tmp}/run --every nan", "--every nan: give seconds"),
        ("{tmp}/run --every inf", "--every inf: give seconds"),
        ("{tmp}/run --last 0", "--last 0: give a number of iterations, at least 1."),
        ("{tmp}/run --png {tmp}", "is a directory; give a file."),
        ("{tmp}/run --png {tmp}/run/state.json/a.png", "state.json"),
        ("{tmp}/run " * 11, "11 runs are too many to tell apart; give at most 10."),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    done = tool(*arguments.format(tmp=tmp_path).split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_runs_are_named_by_what_tells_them_apart():
    def named(*paths):
        return watch.names([Path(path) for path in paths])

    assert named("/x/a/run") == ["run"]
    assert named("/x/a/run", "/x/b/run") == ["a/run", "b/run"]
    assert named("/x/run", "/y/x/run") == ["/x/run", "y/x/run"]
    assert named("/x/run", "/x/run") == ["run", "run"]


# --- terminal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize(("width", "height"), [(24, 30), (40, 24), (79, 24), (80, 50), (100, 40), (140, 60), (300, 80)])
def test_a_screen_fits_the_terminal(tmp_path, runs, width, height):
    text = watch.screen(watched(*[write_run(tmp_path / str(i)) for i in range(runs)]), None, width, height, False)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and len(lines) <= height
    assert "\x1b" not in text
    assert any("⠤" in line or "⣀" in line or "A" in line for line in lines), "a curve is drawn"
    left_out = re.search("no room for ([1-3]) of 4 plots", text)
    assert text.count("└") == 4 - int(left_out[1] if left_out else 0)
    assert (left_out is None) == (height >= 50 or width >= 79)


def test_one_run_is_told_in_full(tmp_path):
    loads = {"3": [0.25] * 4, "11": [0.7, 0.1, 0.1, 0.1]}
    run = write_run(tmp_path / "moe", loads=loads)
    done = tool(run, COLUMNS="120", LINES="50")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("moe: finished | iteration 60 of 60 (100.0%) | tokens 60 k | loss 2.0996")
    assert "loss (nats per token), x: validation" in done.stdout and "┊" not in done.stdout
    assert lines[-2:] == ["layer 3       1.00    1.000  ▄▄▄▄", "layer 11      2.80    0.678  █▂▂▂"]
    assert max(map(len, lines)) <= 120


def test_restarts_are_dotted_lines(tmp_path):
    run = tmp_path / "run"
    for start in (0, 30):
        add(run, {"resume": start, "time": 1.0}, *(step(i, loss=3.0) for i in range(start + 1, 61)))
    plot = watch_plots.plots(watched(run), None, 200)[0]
    lines = watch_plots.terminal_plot(plot, 61 + 4, 12, False)
    columns = {match.start() for line in lines for match in re.finditer("┊", line)}
    left = lines[1].index("┌")
    assert columns == {left + 1 + round(29 / 59 * (len(lines[1]) - left - 3))}
    assert sum("┊" in line for line in lines) == 12 - 5, "every row but the title, the frame, the ticks and the curve's"


def test_layers_that_do_not_fit_are_the_even_ones(tmp_path):
    loads = {str(i): [0.25] * 4 for i in range(9)} | {"4": [0.4, 0.2, 0.2, 0.2]}
    (run,) = watched(write_run(tmp_path, loads=loads))
    lines = watch_plots.load_lines(run, 80, 5)
    assert len(lines) == 5 and lines[-1] == "6 layers that are more even are left out"
    assert any(line.startswith("layer 4") for line in lines)
    assert len(watch_plots.load_lines(run, 80, 10)) == 10
    assert watch_plots.load_lines(run, 80, 1) == []


def test_a_busy_expert_shows_where_there_is_no_room_for_all(tmp_path):
    shares = [0.5 / 255] * 256
    shares[77] = 0.5
    (run,) = watched(write_run(tmp_path, loads={"1": shares}))
    line = watch_plots.load_lines(run, 80, 5)[-1]
    assert len(line) <= 80 and line.count("█") == 1


def test_runs_are_told_apart_without_colours_by_letters(tmp_path):
    runs = [write_run(tmp_path / name, steps) for name, steps in (("one", 60), ("two", 30))]
    done = tool(*runs, COLUMNS="140", LINES="50")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("A  one: finished | iteration 60 of 60") and lines[1].startswith("B  two: finished")
    body = "\n".join(lines[2:])
    assert "lower case: validation" in body and "expert loads" not in body
    drawn = re.sub(r"[a-z]{2,}", "", body)
    assert all(letter in drawn for letter in "ABab")


def test_runs_are_told_apart_by_colours_on_a_terminal(tmp_path):
    runs = watched(*[write_run(tmp_path / name) for name in ("one", "two")])
    text = watch.screen(runs, None, 100, 50, True)
    lines = text.splitlines()
    assert lines[0].startswith("\x1b[38;5;12m━━\x1b[0m one: ") and lines[1].startswith("\x1b[38;5;3m━━\x1b[0m two: ")
    assert "\x1b[38;5;3mx" in text, "the validation of the second"
    assert max(len(plain(line)) for line in lines) <= 100
    colors = [line.split("━━")[0] for line in (watch_plots.key(i, True) for i in range(10))]
    assert len(set(colors)) == len(watch_plots.LETTERS) == 10


def test_a_header_of_several_runs_is_whole_facts_in_one_line(tmp_path):
    (run,) = watched(write_run(tmp_path / "run"))
    whole = watch.header(run, 500, watch.BRIEF)
    assert len(whole) == 1 and "speed" in whole[0]
    for width in range(25, 100):
        (line,) = watch.header(run, width, watch.BRIEF)
        assert len(line) <= width and set(line.split(" | ")) <= set(whole[0].split(" | "))


def test_a_run_with_a_single_step_can_be_drawn(tmp_path):
    add(tmp_path / "run", step(1))
    done = tool(tmp_path / "run", "--png", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert "•" in done.stdout and "no state.json" in done.stdout and (tmp_path / "a.png").exists()


# --- PNG ---------------------------------------------------------------------------------------------


def white(image, column, row, rows):
    """Whether a cell of two columns, below the title, is blank."""
    width, height = image.size
    top = height - 360 * rows
    left = column * width // 2 + (120 if column else 30)  # the scale of the loads is beside the first column
    box = (left, top + 360 * row + 30, (column + 1) * width // 2 - 30, top + 360 * (row + 1) - 30)
    return image.crop(box).convert("L").getextrema() == (255, 255)


def test_the_png_has_a_plot_for_all_there_is(tmp_path):
    moe = write_run(tmp_path / "moe", loads={"3": [0.25] * 4, "7": [0.125] * 8})
    dense = write_run(tmp_path / "dense_$1$", loads=None)
    for run, rows, blank in ((moe, 3, [(1, 2)]), (dense, 2, [(1, 1)])):
        done = tool(run, "--png", tmp_path / "new" / "run.png")
        assert done.returncode == 0, done.stderr
        image = Image.open(tmp_path / "new" / "run.png")
        assert image.format == "PNG" and image.size == (1300, 60 + 360 * rows)
        cells = [(column, row) for row in range(rows) for column in (0, 1)]
        assert [cell for cell in cells if white(image, *cell, rows)] == blank
        grey = sum(n for n, color in image.convert("RGB").getcolors(1 << 20) if color == (128, 128, 128))
        assert (grey > 10_000) == (run == moe), "where a layer has fewer experts than others"
    assert not list((tmp_path / "new").glob(".*")), "no temporary file is left"


def test_the_png_is_replaced_as_a_whole_when_there_is_news(tmp_path):
    run, path, old = write_run(tmp_path / "run", 20, "running"), tmp_path / "run.png", tmp_path / "old.png"
    runs = [Progress(run)]
    watch.update(runs, None, path)
    os.link(path, old)
    before = old.read_bytes()
    watch.update(runs, None, path)
    assert path.samefile(old), "nothing is new"
    add(run, *(step(i) for i in range(21, 60)))
    watch.update(runs, None, path)
    assert not path.samefile(old) and path.read_bytes() != before == old.read_bytes()
    write_state(run, State(status="finished", iteration=60, train_iters=60))
    second = path.read_bytes()
    watch.update(runs, None, path)
    assert path.read_bytes() != second, "the title says that it is finished"


def test_the_png_title_of_many_runs_is_whole(tmp_path):
    runs = [write_run(tmp_path / (str(i) * 140)) for i in range(3)]
    assert tool(*runs, "--png", tmp_path / "a.png").returncode == 0
    image = Image.open(tmp_path / "a.png").convert("L")
    assert image.size == (1300, round(100 * (0.4 + 0.2 * 6 + 3.6 * 3)))
    assert image.crop((0, 0, 10, 120)).getextrema() == (255, 255), "no line of the title is cut at the edge"


# --- live --------------------------------------------------------------------------------------------


class Terminal:
    """A pseudo terminal of 100 by 40 with the tool in it."""

    def __init__(self, *arguments, **environment):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [*TOOL, *map(str, arguments)],
            cwd=ROOT,
            env=ENVIRONMENT | {"TERM": "xterm-256color"} | environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def read(self, until=None):
        """Reads up to what is waited for, or to the end."""
        data, end = b"", time.monotonic() + 300
        while until is None or until not in plain(data.decode(errors="ignore")):
            assert select.select([self.ours], [], [], end - time.monotonic())[0], data[-2000:]
            try:
                data += os.read(self.ours, 1 << 16)
            except OSError:  # the other side is closed
                assert until is None, data[-2000:]
                break
        self.text += data.decode(errors="ignore")
        return data.decode(errors="ignore")

    def end(self):
        rest = self.read()
        os.close(self.ours)
        return self.process.wait(300), rest


@pytest.fixture
def terminal():
    opened = []

    def start(*arguments, **environment):
        opened.append(Terminal(*arguments, **environment))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()


def test_a_run_is_shown_live_until_it_is_finished(tmp_path, terminal):
    run = tmp_path / "run"
    run.mkdir()
    shown = terminal(run, "--every", "0.1", "--png", tmp_path / "run.png")
    shown.read("no step is done yet")
    assert not (tmp_path / "run.png").exists()
    write_run(run, 20, "running")
    shown.read("iteration 20 of 60")
    add(run, {"resume": 15, "time": 1.0}, *(step(i) for i in range(16, 61)))
    shown.read("starts 2, from 15")
    write_state(run, State(status="finished", iteration=60, train_iters=60))
    code, _ = shown.end()
    assert code == 0
    before, after = shown.text.split("\x1b[?1049l")
    assert before.count("\x1b[?1049h") == 1, "on a screen of its own"
    final = plain(after)
    assert "run: finished | iteration 60 of 60" in final and "gradient norm" in final and "┊" in final
    assert max(map(len, final.splitlines())) <= 100
    assert (tmp_path / "run.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_terminal_as_before(tmp_path, terminal, number):
    shown = terminal(write_run(tmp_path / "run", 20, "running"), "--every", "600")
    shown.read("expert loads")
    shown.process.send_signal(number)
    code, _ = shown.end()
    assert "Traceback" not in shown.text and "\x1b[?1049l" in shown.text and "\x1b[?25h" in shown.text
    assert code == (0 if number == signal.SIGINT else 143)
    after = plain(shown.text.split("\x1b[?1049l")[1])
    assert ("iteration 20 of 60" in after) == (number == signal.SIGINT)


def test_once_prints_on_a_terminal_too(tmp_path, terminal):
    run = write_run(tmp_path / "run", 20, "running")
    for environment, colored in (({}, True), ({"NO_COLOR": "1"}, False)):
        shown = terminal(run, "--once", **environment)
        code, _ = shown.end()
        assert code == 0 and "\x1b[?1049h" not in shown.text and "gradient norm" in shown.text
        assert ("\x1b[38;5;12m" in shown.text) == colored
