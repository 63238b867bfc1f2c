"""Tests marked ``triton_interpreter`` run in a pytest of their own, which interprets Triton kernels.

The marked tests of a file that were selected run together; their reports come back one by one, as if they had run here.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest

from tests.support import triton_interpreter
from tests.support.processes import python

MARKER = "triton_interpreter"
REPORTS = "INTERPRETED_TESTS_REPORTS"
"""Variable with the path to which the process that interprets writes its reports, one a line."""
BOUND_S = 570
"""For the marked tests of a file together: less than one test may take (pyproject.toml)."""

Reports = dict[str, list[pytest.TestReport]]
FOUND = pytest.StashKey[Reports]()


class _Writer:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        with open(os.environ[REPORTS], "a") as out:
            out.write(json.dumps(report._to_json(), default=str) + "\n")


def configure(config: pytest.Config) -> None:
    """To be done when pytest starts."""
    config.addinivalue_line("markers", f"{MARKER}: calls Triton kernels on CPU tensors, in a process of its own")
    if triton_interpreter.interpreted():
        triton_interpreter.install()
        if REPORTS in os.environ:
            config.pluginmanager.register(_Writer())


def run_elsewhere(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """To be done for each test: whether it is marked, and has been run and reported.

    nextitem: The next test of this process; what it does not share with the one before is torn down, as after any test.
    """
    if triton_interpreter.interpreted() or item.get_closest_marker(MARKER) is None:
        return False
    found = item.session.stash.setdefault(FOUND, {})
    if item.nodeid not in found:
        found.update(_run([i for i in item.session.items if i.path == item.path and i.get_closest_marker(MARKER)]))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in found[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.session._setupstate.teardown_exact(nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run(items: list[pytest.Item]) -> Reports:
    """Reports of each item; what the process printed for those that it did not finish."""
    found: Reports = {item.nodeid: [] for item in items}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reports"
        path.touch()
        names = Path(folder) / "names"
        names.write_text("\n".join(found))
        root = items[0].config.rootpath  # from which the names of tests are counted
        words = ["-m", "pytest", f"@{names}", "--rootdir", root, "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
        not_theirs = {"PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"}
        inherited = {name: value for name, value in os.environ.items() if name not in not_theirs}
        there = inherited | {triton_interpreter.VARIABLE: "1", REPORTS: str(path)}
        ended = python(*words, env=there, cwd=root, timeout=BOUND_S)
        for line in path.read_text().splitlines():
            report = pytest.TestReport._from_json(json.loads(line))
            if isinstance(report.longrepr, list):  # where a test was skipped: a tuple before JSON
                report.longrepr = tuple(report.longrepr)
            found.setdefault(report.nodeid, []).append(report)
    for item in items:
        if all(report.when != "teardown" for report in found[item.nodeid]):
            found[item.nodeid].append(_lost(item, ended.stdout + ended.stderr))
    return found


def _lost(item: pytest.Item, printed: str) -> pytest.TestReport:
    text = f"the process that interprets kernels ended before this test had\n{printed}"
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, "call")
