"""Text files of all kinds that people have."""

import json

import pytest

from attnmem_local.builder.sources.traces import read_traces
from attnmem_local.prompt.texts import read_text

TEXT = "The desk opens at 9:00. A café is on the first floor.\n" * 3


@pytest.fixture
def write(tmp_path):
    def write(data: bytes, name: str = "file.txt"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


@pytest.mark.parametrize("data", [TEXT.encode(), TEXT.encode("utf-8-sig"), TEXT.replace("\n", "\r\n").encode("utf-8-sig")])
def test_the_same_text_from_unix_and_windows(write, data):
    assert read_text(write(data)) == TEXT


@pytest.mark.parametrize(
    "encoding, named",
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32"),
        ("latin-1", "line 1, byte 0xe9"),
    ],
)
def test_another_encoding_names_the_file_and_how_to_convert_it(write, encoding, named):
    path = write(TEXT.encode(encoding))
    with pytest.raises(ValueError) as error:
        read_text(path)
    assert str(path) in str(error.value) and named in str(error.value) and "iconv" in str(error.value)


@pytest.mark.parametrize("data, says", [(b"\x00\x01\xfe\xff" * 9, "not a text"), (("é" * 9).encode()[:-1], "not complete")])
def test_what_is_no_whole_text(write, data, says):
    with pytest.raises(ValueError, match=says):
        read_text(write(data))


def test_a_chat_log_with_separators_of_unicode_in_its_strings(write):
    rows = ["one\u2028two", "one\u0085two", "one\rtwo"]
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    for end in ("\n", "\r\n", "\n\n"):
        assert read_traces(write(end.join(lines).encode("utf-8-sig"), "log.JSONL")) == rows


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"words": 3}', "expected a JSON object"),
        ('{"text": "a', "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"text": 3}', "'text' is a string"),
        ('{"messages": [{"content": "Hi"}]}', "each with a role"),
        ('{"messages": "Hi"}', "each with a role"),
        ('{"messages": {"role": "user"}}', "each with a role"),
        (r'{"text": "\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_of_traces_is_named(write, line, says):
    path = write(('{"text": "fine"}\n\n' + line).encode(), "bad.jsonl")
    with pytest.raises(ValueError, match=says) as error:
        read_traces(path)
    assert str(path) in str(error.value) and "line 3" in str(error.value)


def test_traces_without_any_text(write):
    with pytest.raises(ValueError, match="no text"):
        read_traces(write(b"\n", "empty.jsonl"))
