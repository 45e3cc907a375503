"""Input files are read with the line that is wrong, and answers are never half written."""

import json

import pytest

from launch.documents import Document, append_jsonl, finished_ids, read_document, read_jsonl, write_json
from megatron_star.inference.request import StarResult, Timings

RESULT = StarResult(
    text="Grüße",
    tokens=[1],
    logprobs=[-0.5],
    finish_reason="stop",
    num_context_tokens=2,
    num_query_tokens=3,
    mode="star",
    num_blocks=1,
    cache_hit=False,
    timings=Timings(queue_s=0.0, context_encoding_s=1.0, query_s=0.5, ttft_s=1.5, tpot_s=0.1),
    kv_bytes_per_rank=[4],
)


def test_lines_have_ids_of_their_own_or_their_number(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"context": "c", "query": "q", "id": "x", "other": 1}\n\n{"context": "", "query": "p"}\n'
    )
    assert read_jsonl(str(path)) == [Document("x", "c", "q"), Document("2", "", "p")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"context": "c"}', "line 2: the field 'query' is missing"),
        ('{"context": 3, "query": "q"}', "line 2: the field 'context' is missing or not a string"),
        ('{"context": "c", "query": "q", "id": "0"}', "'0' occurs twice"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_text('{"context": "c", "query": "q"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_jsonl(str(path))


def test_a_file_that_is_not_text_is_refused_with_the_place(tmp_path):
    path = tmp_path / "context"
    path.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="not UTF-8 text.*byte 3"):
        read_document(str(path), "q", None)


def test_answers_are_appended_and_found_again(tmp_path):
    path = tmp_path / "out.jsonl"
    assert finished_ids(str(path)) == set()
    append_jsonl(str(path), [(Document("a", "", ""), RESULT)])
    append_jsonl(str(path), [(Document("b", "", ""), RESULT)])
    assert finished_ids(str(path)) == {"a", "b"}
    assert json.loads(path.read_text().splitlines()[0])["text"] == "Grüße"


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b", "te')
    assert finished_ids(str(path)) == {"a"}
    assert path.read_text() == '{"id": "a"}\n'


def test_a_file_of_something_else_is_not_taken_for_answers(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("some notes\n")
    with pytest.raises(ValueError, match="not answers of this program"):
        finished_ids(str(path))


def test_one_answer_is_written_as_json(tmp_path):
    path = tmp_path / "out.json"
    write_json(str(path), RESULT)
    answer = json.loads(path.read_text())
    assert answer["timings"]["ttft_s"] == 1.5
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]
