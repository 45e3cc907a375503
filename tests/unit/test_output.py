"""Outputs: what is not ours stays as it is, one job writes at a time, and a later run asks the same."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import mutated

from megatron_star.checked_input import strict_fields
from megatron_star.job import asked
from megatron_star.job.answer_files import AnswerFile, AnswerLines
from megatron_star.job.output_file import check_not_an_input


class Record:
    id: str | int
    asked: dict


def lines(path, inputs=None) -> AnswerLines:
    return AnswerLines(str(path), "generate", strict_fields(Record), inputs or {})


def answer(name, **asked) -> dict:
    return {"id": name, "asked": asked, "text": "Grüße"}


def written(*records) -> str:
    return "".join(json.dumps({"program": "generate"} | record) + "\n" for record in records)


def test_answers_are_appended_and_found_again(tmp_path):
    path = tmp_path / "out.jsonl"
    with lines(path) as output:
        assert output.records == {}
        output.append([answer("a", top_k=1), answer(2, top_k=1)])
    with lines(path) as output:
        output.append([answer("c", top_k=1)])
    with lines(path) as output:
        assert list(output.records) == ["a", "2", "c"]
        assert output.finished({name: {"top_k": 1} for name in ("a", "2", "d")}) == {"a", "2"}
    assert json.loads(path.read_text().splitlines()[0])["text"] == "Grüße"


@pytest.mark.parametrize("rest", ['{"program": "generate", "id": "b", "te', '{"prog', "{"])
def test_a_torn_line_of_ours_is_cut_off_when_there_is_something_to_write(tmp_path, rest):
    path = tmp_path / "out.jsonl"
    path.write_text(written(answer("a")) + rest)
    before = path.read_bytes()
    with lines(path) as output:
        assert list(output.records) == ["a"]
        assert path.read_bytes() == before
        output.append([answer("b")])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_a_first_line_that_was_torn_is_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"program": "generate", "id"')
    with lines(path) as output:
        output.append([answer("b")])
    assert json.loads(path.read_text())["id"] == "b"


def test_a_whole_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text(written(answer("a")).rstrip("\n"))
    with lines(path) as output:
        output.append([answer("b")])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


NOT_OURS = {
    "one object": '{"id": 1, "note": 2}',
    "a line of an object": '{"id": 1, "note": 2}\n',
    "text": "some notes\nmore",
    "text without an end": "some notes",
    "a bracket": "{",
    "another program's": '{"program": "eval", "id": "a", "asked": {}}\n',
    "an older version's": '{"id": "a", "text": "b", "tokens": [1]}\n',
    "ours, then text": written(answer("a")) + "my own notes",
    "ours without an id": '{"program": "generate", "asked": {}}\n',
    "ours twice": written(answer("a"), answer("a")),
    "ours, an empty line": written(answer("a")) + "\n" + written(answer("b")),
    "not text": "\udcff\udcfe\n",
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_what_is_not_ours_is_refused_and_stays_as_it_is(tmp_path, what):
    path = tmp_path / "out.jsonl"
    path.write_bytes(NOT_OURS[what].encode(errors="surrogateescape"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^{path}, line "):
        lines(path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="not written by this version of megatron-star other: give another"):
        AnswerFile(str(path), "other", {})
    assert path.read_bytes() == before


def test_a_thousand_damaged_outputs_are_gone_on_with_or_refused_and_stay_as_they_are(tmp_path):
    path, generator = tmp_path / "out.jsonl", random.Random(0)
    good = written(*(answer(name, top_k=1) for name in ("a", 2, "c"))).encode()
    refused = 0
    for _ in range(1000):
        damaged = mutated(good, generator)
        path.write_bytes(damaged)
        try:
            with lines(path) as output:
                output.finished({"a": {"top_k": 1}})
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        assert path.read_bytes() == damaged
    assert refused > 500


@pytest.mark.parametrize("link", [os.symlink, os.link, None])
def test_an_output_that_is_an_input_is_refused(tmp_path, link):
    source, path = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("")
    path = tmp_path / "x" / ".." / "in.jsonl" if link is None else path
    (tmp_path / "x").mkdir()
    if link:
        link(source, path)
    with pytest.raises(ValueError, match="is what --input-jsonl reads: give another --output"):
        lines(path, {"--input-jsonl": source})
    check_not_an_input(tmp_path / "other", {"--input-jsonl": source, "--query-file": None})


@pytest.mark.parametrize("path", ["missing/out.jsonl", "folder", "/dev/null"])
def test_what_cannot_be_written_to_is_noticed_at_once(tmp_path, path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="there is no folder|is no regular file"):
        lines(tmp_path / path)


def test_an_output_that_got_nothing_leaves_nothing(tmp_path):
    with lines(tmp_path / "out.jsonl"), AnswerFile(str(tmp_path / "a.json"), "generate", {}):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_second_job_is_refused_until_the_first_has_died(tmp_path):
    path = tmp_path / "out.jsonl"
    hold = "import sys, test_output as t; o = t.lines(sys.argv[1]); print('held', flush=True); input()"
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, [Path(__file__).parent, *sys.path]))}
    first = subprocess.Popen(
        [sys.executable, "-c", hold, path], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another job is writing to it: give another --output"):
        lines(path)
    first.kill()
    first.communicate()
    with lines(path) as output, pytest.raises(ValueError, match="another job is writing to it"):
        output.append([answer("a")])
        lines(path)


def test_another_question_with_the_same_id_is_named(tmp_path):
    with lines(tmp_path / "out.jsonl") as output:
        output.append([answer("a", top_k=1, stop=["x"])])
    with lines(tmp_path / "out.jsonl") as output:
        assert output.finished({"a": {"top_k": 1, "stop": ["x"]}}) == {"a"}
        with pytest.raises(ValueError, match=r"'a' was asked with another top_k \(1, now 5\): give"):
            output.finished({"a": {"top_k": 5, "stop": ["x"]}})
        with pytest.raises(ValueError, match="was asked with another seed"):
            output.finished({"a": {"top_k": 1, "stop": ["x"], "seed": 0}})


def test_one_answer_is_written_whole_and_replaces_an_earlier_one(tmp_path):
    path, link = tmp_path / "out.json", tmp_path / "link.json"
    link.symlink_to(path)
    for text in ("first", "second"):
        with AnswerFile(str(link), "generate", {}) as output:
            output.write({"id": "0", "text": text})
    assert json.loads(path.read_text())["text"] == "second"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.json", "out.json"]
    assert link.is_symlink()


def test_a_full_disk_keeps_what_was_there_and_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    with lines(path) as output:
        output.append([answer("a")])
        before = path.read_bytes()
        os_write = os.write
        some = iter([10])

        def full(descriptor, content):
            count = next(some, None)
            if count is None:
                raise OSError(28, "No space left on device")
            return os_write(descriptor, content[:count])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError) as error:
            output.append([answer("b")])
        monkeypatch.undo()
    assert error.value.filename == str(path)
    assert path.read_bytes() == before


def test_an_answer_that_is_no_number_is_not_written(tmp_path):
    with lines(tmp_path / "out.jsonl") as output, pytest.raises(ValueError, match="the answer 'a'.*nan"):
        output.append([answer("a") | {"logprobs": [float("nan")]}])


def test_another_checkpoint_of_the_same_name_is_another_model(checkpoints, tmp_path):
    _, megatron = checkpoints("llama")
    args = asked.argparse.Namespace(load=megatron, dtype=None, kv_dtype="auto")
    before = asked.of_model(args)
    assert before == asked.of_model(args)
    copy = tmp_path / megatron.name
    asked.Path(copy).mkdir()
    subprocess.run(["cp", "-r", f"{megatron}/.", copy], check=True)
    assert asked.of_model(asked.argparse.Namespace(load=copy, dtype=None, kv_dtype="auto")) == before
    weights = next(copy.glob("release/*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 : len(content) // 2 + len(content) // 30] = bytes(len(content) // 30)
    weights.write_bytes(content)
    assert asked.of_model(asked.argparse.Namespace(load=copy, dtype=None, kv_dtype="auto")) != before
