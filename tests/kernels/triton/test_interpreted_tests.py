"""How tests in the process that interprets kernels are reported (tests/support/interpreted_tests.py)."""

import re

from tests.support.processes import python

CONFTEST = """
from tests.support import interpreted_tests

pytest_configure = interpreted_tests.configure

def pytest_runtest_protocol(item, nextitem):
    return interpreted_tests.run_elsewhere(item, nextitem) or None
"""
TESTS = """
import os
import pytest
from tests.support.triton_interpreter import interpreted

def test_plain():
    assert not interpreted()

there = pytest.mark.triton_interpreter

@there
def test_passes():
    assert interpreted()

@there
def test_fails():
    print("this is shown")
    assert 1 == 2

@there
@pytest.mark.skip(reason="said why")
def test_is_skipped(): ...

@there
def test_ends_the_process():
    os._exit(3)

@there
def test_is_not_reached(): ...
"""


def test_outcomes_are_those_of_the_other_process(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for folder in ("first", "second"):  # tests around those of another process are set up and torn down
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "first" / "test_it.py").write_text(TESTS)
    (tmp_path / "second" / "test_after.py").write_text("def test_last(): ...")
    words = ["-p", "no:cacheprovider", "--rootdir", tmp_path, "-rA", "-q", tmp_path]
    out = python("-m", "pytest", *words).stdout
    outcomes = {name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED) .*::(\w+)", out, re.M)}
    assert outcomes == {
        "test_plain": "PASSED",
        "test_passes": "PASSED",
        "test_fails": "FAILED",
        "test_ends_the_process": "FAILED",
        "test_is_not_reached": "FAILED",
        "test_last": "PASSED",
    }
    assert "this is shown" in out and "said why" in out
    assert out.count("the process that interprets kernels ended before this test had") >= 2
