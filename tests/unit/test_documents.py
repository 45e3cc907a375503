"""Input files are read with the line that is wrong."""

import json
import random

import pytest
from mutations import mutated

from megatron_star.checked_input import parse_json
from megatron_star.job.documents import Document, read_document, read_jsonl

LINE = {"context": "c", "query": "q"}


def test_lines_have_ids_of_their_own_or_their_number(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"context": "c", "query": "q", "id": "x", "other": 1}\n\n{"context": "", "query": "p"}\n'
        '{"context": "", "query": "p", "id": null}\n{"context": "", "query": "p", "id": 7}\n'
    )
    assert read_jsonl(str(path)) == [
        Document("x", "c", "q"),
        Document("2", "", "p"),
        Document("3", "", "p"),
        Document(7, "", "p"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", r"line 2: \[1\]: input should be a valid dictionary"),
        ('{"context": "c"}', "line 2: the field 'query' is missing"),
        ('{"context": 3, "query": "q"}', "line 2: the field 'context' is 3: input should be a valid string"),
        ('{"context": "c", "query": " "}', "line 2: the field 'query' is ' ': it needs at least one word"),
        ('{"context": "c", "query": "q", "id": "0"}', "line 2: the id '0' occurs twice"),
        ('{"context": "c", "query": "q", "id": 0}', "line 2: the id 0 occurs twice"),
        ('{"context": "c", "query": "q", "id": true}', "the field 'id' is True: it must be a string or a"),
        ('{"context": "c", "query": "q", "id": 1.5}', "the field 'id' is 1.5: it must be a string or a"),
        ('{"context": "c", "query": "q", "id": []}', r"the field 'id' is \[\]: it must be a string or a"),
        ('{"context": "c", "query": "q", "query": "p"}', "line 2: not JSON: the name 'query' occurs twice"),
        ('{"context": "\\ud83d", "query": "q"}', "line 2: not JSON: .* is no character"),
        ('{"context": "c", "query": "q", "x": NaN}', "line 2: not JSON: NaN is no finite number"),
        ('{"context": "c", "query": "q", "x": 1e999}', "line 2: not JSON: 1e999 is no finite number"),
        ("[" * 100_000, "line 2: not JSON: nested too deeply"),
        ("1" * 5000, "line 2: not JSON: Exceeds the limit"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_text('{"context": "c", "query": "q"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_jsonl(str(path))


def test_lines_end_at_line_feeds_alone_and_a_byte_order_mark_is_no_text(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0cfive\x1esix"
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"context": text, "query": str(i)}, ensure_ascii=False) for i in range(2)]
    path.write_bytes("\r\n".join(["\ufeff" + lines[0], lines[1]]).encode())
    assert read_jsonl(str(path)) == [Document("0", text, "0"), Document("1", text, "1")]
    (tmp_path / "context").write_bytes("\ufeffThe end.".encode())
    assert read_document(str(tmp_path / "context"), "q", None).context == "The end."


def test_a_character_of_two_escapes_is_a_character():
    assert parse_json('"\\ud83d\\ude00 \\\\ud83d"', "here") == "\U0001f600 \\ud83d"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff", "not UTF-8 text: .* at byte 3$"),
        ("abc".encode("utf-16"), "at byte 0; is it UTF-16?"),
    ],
)
def test_a_file_that_is_not_text_is_refused_with_the_place(tmp_path, content, message):
    path = tmp_path / "context"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_document(str(path), "q", None)


@pytest.mark.parametrize(
    ("query", "message"), [(" \n", "--query: the query is empty"), ("\udcff", "is no character")]
)
def test_a_query_of_the_command_line_is_text(tmp_path, query, message):
    (tmp_path / "context").write_text("c")
    with pytest.raises(ValueError, match=message):
        read_document(str(tmp_path / "context"), query, None)


def test_a_thousand_damaged_files_are_read_or_refused_by_name(tmp_path):
    """Each mutation of good lines is read, or a ValueError that names the file: no other exception."""
    path, generator = tmp_path / "in.jsonl", random.Random(0)
    good = [json.dumps(LINE | {"id": name}) for name in ("a", 1, None)] + [
        '{"query":"\\ud83d\\ude00","context":""}'
    ]
    refused = 0
    for _ in range(1000):
        path.write_bytes(mutated("\n".join(good).encode(), generator))
        try:
            assert all(isinstance(document.query, str) for document in read_jsonl(str(path)))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 500
