"""What a record has to be, and what is said of one that is not."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_hybrid.data.batches import read_batches, shard
from megatron_hybrid.data.documents import BadRecord, parse, text_of
from megatron_hybrid.data.filters import Filters, alphanumeric
from megatron_hybrid.data.sources import find_sources

from .corpora import lines


def parsed(path, keys=("text",), split="file"):
    texts, faults = [[] for _ in keys], []
    for batch in read_batches(shard(find_sources([str(path)])[0], 0, 1), list(keys), split):
        found, bad = parse(batch, list(keys), split)
        for column, new in zip(texts, found, strict=True):
            column += new
        faults += bad
    return texts, faults


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half', "not valid JSON"),
        (b'{"text": "\xff"}', "not valid UTF-8 at byte 11 of the line"),
        (b"[1]", "is a JSON array, not an object"),
        (b"12", "is a JSON number, not an object"),
        (b'{"body": "x", "id": 1}', 'no key "text" (the line has: body, id)'),
        (b"{}", 'no key "text" (the line has: none)'),
        (b'{"text": 3}', 'the value of "text" is of JSON type number'),
        (b'{"text": null}', 'the value of "text" is of JSON type null'),
        (b'{"text": "a\x00b"}', "null byte at byte 12 of the line"),
        (bytes(20), "null byte at byte 1 of the line"),
        (b'{"text": "a\\u0000b"}', "null character"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": "x"} {"text": "y"}', "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    texts, faults = parsed(path)
    assert texts == [["good", "also good"]]
    assert [(f.path, f.record) for f in faults] == [(str(path), 3)] and message in faults[0].reason


@pytest.mark.parametrize(
    ("line", "key", "text"),
    [
        ('{"text": "a", "score": NaN, "n": 123456789012345678901234567890}', "text", "a"),
        ('{"text": "first", "text": "last"}', "text", "last"),
        ('{"meta": {"text": {"en": "deep"}}}', "meta.text.en", "deep"),
        ('{"a.b": "whole name", "a": {"b": "nested"}}', "a.b", "whole name"),
        ('{"text": "\\ud83d\\ude42"}', "text", "🙂"),
    ],
)
def test_lines_that_are_taken(line, key, text):
    assert text_of(line.encode(), key) == text


@pytest.mark.parametrize("line", ['{"a": "x"}', '{"a": {"c": "x"}}', '{"a": {"b": 1}}', '{"a": null}'])
def test_nested_keys_that_are_missing(line):
    with pytest.raises(BadRecord, match=r"a\.b"):
        text_of(line.encode(), "a.b")


def test_a_record_is_left_out_under_all_keys_or_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": "1", "y": "2"}\n{"x": "3"}\n{"x": "5", "y": "6"}\n')
    texts, faults = parsed(path, ("x", "y"))
    assert texts == [["1", "5"], ["2", "6"]] and [f.record for f in faults] == [2]


def test_faults_of_plain_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nb\xffd\nn\x00l\nlast")
    texts, faults = parsed(path, split="line")
    assert texts == [["good", "last"]]
    assert [str(f) for f in faults] == [
        f"{path}:2: not valid UTF-8.",
        f"{path}:3: null byte; a corrupt or binary file?",
    ]
    assert [f.record for f in parsed(path)[1]] == [3], "as one document it is a null byte in line 3"


LINE = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(max_size=30).map(
        lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2),
    ).map(lambda value: json.dumps(value).encode()),
)


def oracle(line):
    """The text of a line by Python's own json alone; None for a blank line, False for a bad one."""
    if not line.strip(b" \t\r\n\x0b\x0c"):
        return None
    try:
        text = json.loads(line.decode())["text"]
        text.encode()
        return text if isinstance(text, str) and "\0" not in text else False
    except Exception:
        return False


@settings(max_examples=400, deadline=None)
@given(st.lists(LINE, max_size=8))
@example([b'{"text": "a"}\r', b"\x0b", b"\xef\xbb\xbf{}"])
def test_any_bytes_give_the_good_documents_and_name_the_rest(tmp_path_factory, found):
    found = [line.replace(b"\n", b" ") for line in found]
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(b"\n".join(found))
    expected = [oracle(line) for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    texts, faults = parsed(path)
    assert texts[0] == [text for text in expected if text is not None and text is not False]
    assert [f.record for f in faults] == [number for number, text in enumerate(expected, 1) if text is False]
    assert all(f.reason for f in faults)


# --- filters ---------------------------------------------------------------------------------------


def test_filters():
    assert not Filters()
    filters = Filters(min_chars=3, max_chars=6, min_alphanumeric=0.5)
    verdicts = {"ab": "min_chars", "abcdefg": "max_chars", "a!?#": "min_alphanumeric", "ab!?": "", "漢字!?": ""}
    assert {text: filters.broken(text) for text in verdicts} == verdicts


@given(st.text())
def test_letters_and_digits_are_counted_as_python_does(text):
    assert alphanumeric(text) == sum(map(str.isalnum, text))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"min_chars": 0}, "--min-chars 0"),
        ({"min_chars": 9, "max_chars": 3}, "nothing would pass"),
        ({"min_alphanumeric": 1.5}, "--min-alphanumeric 1.5"),
    ],
)
def test_filters_that_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Filters(**rules)


def test_lines_helper_is_json():
    assert [json.loads(line)["text"] for line in lines(["a\nb", "ü"]).splitlines()] == ["a\nb", "ü"]
