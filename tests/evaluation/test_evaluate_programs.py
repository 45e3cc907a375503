"""launch/evaluate.py and launch/calibrate.py as users run them; and what they ask after an interruption."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))

from distributed import RankError, run_ranks
from evaluation_ranks import run_calibrate, run_evaluate
from programs import error_lines, torchrun

from benchmarks import answers_of_transformers
from megatron_star.evaluation.results import read_answers
from megatron_star.evaluation.scoring import match_all
from megatron_star.programs.evaluate import parse_arguments, survey_of

ARGUMENTS = ["--load", "x", "--output", "z", "--lengths", "1K", "--setting", "exact"]


def questions(maker, finished=(), *options: str) -> list[list[str]]:
    """Ids of the answers that are asked for, batch by batch."""
    args = parse_arguments([*ARGUMENTS, "--max-batch-size", "2", "--samples", "3", *options])
    batches = survey_of(args).open_questions(maker, set(finished), args.max_batch_size)
    return [[question.id for question in batch] for batch in batches]


def test_each_batch_of_samples_is_asked_in_all_settings_before_the_next(maker):
    asked = questions(maker, (), "--tasks", "niah_single_1", "--setting", "star block_size=100")
    exact = [f"exact/niah_single_1/1024/0/{index}" for index in range(3)]
    star = [f"star block_size=100/niah_single_1/1024/0/{index}" for index in range(3)]
    assert asked == [exact[:2], star[:2], exact[2:], star[2:]]


def test_what_is_answered_is_not_asked_again(maker):
    options = ("--tasks", "niah_single_1", "variable_tracking", "--depths", "0", "0.5")
    everything = [name for batch in questions(maker, (), *options) for name in batch]
    assert len(everything) == len(set(everything)) == 12
    finished = everything[::2]
    assert [name for batch in questions(maker, finished, *options) for name in batch] == everything[1::2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "niah"], "no task 'niah'"),
        (["--depths", "1.5"], "'1.5' is not a depth of at least 0 and at most 1"),
        (["--samples", "0"], "'0' is not a whole number of at least 1"),
        (["--lengths", "4X"], "'4X' is not a number of tokens"),
        (["--setting", "exact"], "two of the settings are the same"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments([*ARGUMENTS, *options])


@pytest.fixture
def run(smollm2, tmp_path):
    """Runs a program's part after loading, on two ranks, with these arguments; the path that it writes to."""
    output = tmp_path / "out.jsonl"

    def on_two_ranks(function, *options: object):
        command = ["--load", smollm2[1], "--context-parallel-size", 2, "--chat", "--output", output, *options]
        run_ranks(2, function, str(smollm2[1]), list(map(str, command)))
        return output

    return on_two_ranks


@pytest.mark.smollm2
def test_a_run_that_was_cut_off_goes_on_and_then_holds_every_answer_once(run):
    options = ["--lengths", 700, "--tasks", "niah_single_2"]
    settings = ["--setting", "exact", "--setting", "star passed_keys=8"]
    output = run(run_evaluate, *options, *settings, "--samples", 1)
    before = read_answers([output])
    lines = output.read_text().splitlines(keepends=True)
    output.write_text(lines[0] + lines[1][:50])

    run(run_evaluate, *options, *settings, "--samples", 2)
    answers = {answer.id: answer for answer in read_answers([output])}
    assert len(answers) == 4
    assert answers[before[0].id] == before[0]
    assert answers[before[1].id].tokens == before[1].tokens
    for answer in answers.values():
        assert answer.score == match_all(answer.text, answer.references)
        assert answer.num_context_tokens + answer.num_query_tokens + 128 <= 700
        assert (answer.setting == "exact") == (answer.num_blocks == 1)
        assert (answer.encoded_as == answer.setting) == (answer.setting != "star passed_keys=8")

    before = output.read_bytes()
    with pytest.raises(RankError, match=r"'exact/.*' was asked with another dtype .*: give another --output"):
        run(run_evaluate, *options, *settings, "--bf16")
    output.write_bytes(re.sub(rb'"prompt": "[0-9a-f]+"', b'"prompt": "0"', before))
    with pytest.raises(RankError, match="was asked with another prompt"):
        run(run_evaluate, *options, *settings)


@pytest.mark.smollm2
def test_exact_answers_are_compared_with_those_of_transformers(run, smollm2, tmp_path, monkeypatch, capsys):
    options = ["--lengths", 400, "--tasks", "niah_single_2", "--samples", 1, "--setting", "exact"]
    answers, compared = run(run_evaluate, *options), tmp_path / "compared.jsonl"
    (hf, megatron) = smollm2
    command = ["--load", megatron, "--hf", hf, "--answers", answers, "--samples", 1, "--output", compared]
    monkeypatch.setattr("sys.argv", ["answers_of_transformers.py", *map(str, command)])
    answers_of_transformers.main()
    assert "niah_single_2: 1 of 1 answers are the same, token by token" in capsys.readouterr().out

    [answer] = map(json.loads, answers.read_text().splitlines())
    answers.write_text(json.dumps(answer | {"tokens": [*answer["tokens"][:-1], 0]}) + "\n")
    compared.unlink()
    with pytest.raises(SystemExit, match="some answers differ"):
        answers_of_transformers.main()


@pytest.mark.smollm2
def test_a_file_that_a_task_lacks_ends_all_ranks_with_one_line(smollm2, tmp_path):
    command = ["launch/evaluate.py", "--load", smollm2[1], "--context-parallel-size", 2, "--lengths", 400]
    command += ["--tasks", "squad", "--setting", "exact", "--output", tmp_path / "out.jsonl"]
    ended = torchrun(2, *command, timeout=300)
    assert error_lines(ended.stderr) == ["error: the task squad needs a file: --squad FILE"]


@pytest.mark.smollm2
def test_calibrate_asks_each_question_once(run, tmp_path):
    text = "The bridge is old. The river is slow. The mayor, Ann Brill, is tall. " * 12
    lines = [{"id": str(i), "context": text, "query": f"Who is the mayor? ({i})"} for i in range(2)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--input-jsonl", tmp_path / "in.jsonl", "--num-tokens-to-generate", 4, "--ask-all"]
    output = run(run_calibrate, *options, "--setting", "star block_size=64")
    asked = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert sorted(asked) == ["exact/0", "exact/1", "star block_size=64/0", "star block_size=64/1"]

    first, second, third, _ = output.read_text().splitlines(keepends=True)
    output.write_text(first + second + third[:-5])
    run(run_calibrate, *options, "--setting", "star block_size=64")
    assert output.read_text().startswith(first + second)
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == asked
    before = output.read_bytes()
    with pytest.raises(RankError, match="compares other settings: give another --output"):
        run(run_calibrate, *options, "--setting", "star block_size=32")
    lines[1] |= {"context": f"{text} And so on."}
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(RankError, match="'1' was asked with another context"):
        run(run_calibrate, *options, "--setting", "star block_size=64")
    (tmp_path / "in.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(RankError, match=r"has the question '1', which .* lacks"):
        run(run_calibrate, *options, "--setting", "star block_size=64")
    assert output.read_bytes() == before


@pytest.mark.smollm2
def test_a_search_ends_where_its_verdict_is_known(run, tmp_path):
    text = "The bridge is old. The river is slow. The mayor, Ann Brill, is tall. " * 12
    lines = [{"id": str(i), "context": text, "query": f"The mayor is ({i})"} for i in range(8)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--input-jsonl", tmp_path / "in.jsonl", "--num-tokens-to-generate", 1, "--tolerance", 0.6]
    settings = ["--setting", "star block_size=64 neighbor_blocks=1", "--setting", "star block_size=64"]
    output = run(run_calibrate, *options, *settings)
    asked = [json.loads(line)["setting"] for line in output.read_text().splitlines()]
    assert Counter(asked) == {"exact": 8, "star block_size=64": 8}
