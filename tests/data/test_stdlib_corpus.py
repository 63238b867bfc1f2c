"""The corpus made of Python's standard library."""

import pytest

from megatron_hybrid.data.stdlib_corpus import documents, documents_of

MODULE = '''"""Module docstring, {0}."""
import os

class Thing:
    """Class docstring."""

    def empty(self):
        """Only a docstring,
            on two lines."""

    def one(self): "inline docstring"; return 1

    async def go(self):
        """Async docstring."""
        return "not a docstring {0}"
'''


def test_docstrings_are_in_the_prose_and_not_in_the_code(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(MODULE.format("x"))
    code, prose = documents_of(path)
    assert prose.startswith("Module docstring, x.\n\nThing: Class docstring.\n\nempty: Only a docstring,\n")
    assert "go: Async docstring." in prose and "not a docstring" not in prose
    for text in ("Module docstring", "Class docstring", "Only a docstring", "Async docstring"):
        assert text not in code
    assert 'return "not a docstring x"' in code
    namespace: dict = {}
    exec(compile(code, "module", "exec"), namespace)  # what is left is still a program
    assert namespace["Thing"]().one() == 1 and namespace["Thing"]().empty() is None


def test_corpus_is_chosen_deduplicated_and_ordered(tmp_path):
    body = "x = 'a line of code that is long enough'\n" * 10
    for name, number in [("b.py", 1), ("a.py", 2), ("copy.py", 1), ("sub/c.py", 3), ("test/t.py", 4)]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"n = {number}\n{body}")
    (tmp_path / "short.py").write_text("n = 5\n")
    (tmp_path / "latin.py").write_bytes(b"n = 6 # \xe9\n" + body.encode())
    (tmp_path / "broken.py").write_text(f"n = = 7\n{body}")
    (tmp_path / "topics.py").write_text(f"topics = {{'one': {'help ' * 60!r}, 'two': {'HELP ' * 60!r}}}\n")
    found = documents(tmp_path)
    assert sorted(text.splitlines()[0][:5] for text in found) == ["HELP ", "help ", "n = 1", "n = 2", "n = 3"]
    (tmp_path / "a.py").rename(tmp_path / "z.py")
    assert documents(tmp_path) == found, "the order comes from the texts, not from the names"


def test_corpus_without_sources(tmp_path):
    with pytest.raises(ValueError, match="contains no Python sources"):
        documents(tmp_path)
