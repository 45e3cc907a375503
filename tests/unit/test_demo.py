"""The demo: what it hides, what it runs, and when it says that it failed."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_star.evaluation import haystack
from megatron_star.programs import demo
from megatron_star.programs.generate import parse_arguments

NUMBER = "1234567"
QUESTION = SimpleNamespace(references=(NUMBER,), query="Which number?")


def result_of_generate(text: str, ttft_s: float = 2.0, num_blocks: int = 4) -> dict:
    timings = {"context_encoding_s": ttft_s - 0.5, "query_s": 0.5, "ttft_s": ttft_s, "tpot_s": 0.125}
    return {
        "text": text,
        "num_blocks": num_blocks,
        "timings": timings,
        "kv_bytes_per_rank": [90_000_000, 80_000_000],
    }


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Replace generate.py: what each mode answers."""
    texts = {"exact": "It is 1234567.", "star": "It is 1234567."}
    monkeypatch.setattr(demo, "write_question", lambda seed: QUESTION)
    monkeypatch.setattr(demo, "answer", lambda mode: result_of_generate(texts[mode]))
    monkeypatch.setattr("sys.argv", ["demo.py"])
    return texts


@pytest.mark.smollm2
def test_the_number_is_in_the_middle_of_the_context_and_the_query_does_not_give_it_away(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(demo, "FILES", tmp_path)
    first, again, other = (demo.write_question(seed) for seed in (1, 1, 0))
    (number,) = other.references
    context, query = ((tmp_path / f"{name}.txt").read_text() for name in ("context", "query"))
    before, after = context.split(number)
    # Depth counts sentences, whose lengths differ: 3.4% of the context at the most among these seeds.
    assert abs(len(before) - len(after)) < 0.04 * len(context)
    assert number not in query
    assert first == again and first.references != other.references


def test_essays_that_are_missing_are_reported_with_what_fetches_them(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(haystack, "find_spec", lambda _: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="make model"):
        haystack.essay_directory()


@pytest.mark.parametrize("mode", demo.MODES)
def test_generate_accepts_the_arguments_of_the_demo(mode: str):
    arguments = demo.torchrun_arguments(mode)
    parsed = parse_arguments(arguments[arguments.index("launch/generate.py") + 1 :])
    assert parsed.star_mode == mode
    assert parsed.top_k == 1


@pytest.mark.parametrize("text", ["It is 1234567.", "It is 1,234,567."])
def test_a_number_is_found_with_or_without_separators(text: str):
    assert demo.contains({"text": text}, NUMBER)


def test_the_table_is_aligned_and_compares_with_exact_attention():
    results = {"exact": result_of_generate("", 3.0, num_blocks=1), "star": result_of_generate("", 2.0)}
    lines = demo.table(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["exact", "1", "3.0", "125.0", "90.0", "1.00x"]
    assert lines[2].split() == ["star", "4", "2.0", "125.0", "90.0", "1.50x"]


def test_the_demo_shows_both_answers_and_succeeds_if_both_have_the_number(answers, capsys):
    demo.main()
    printed = capsys.readouterr().out
    assert "exact attention has the number: It is 1234567." in printed
    assert "star attention has the number: It is 1234567." in printed


@pytest.mark.parametrize("mode", demo.MODES)
def test_the_demo_fails_if_either_answer_lacks_the_number(answers, capsys, mode: str):
    answers[mode] = "I do not know."
    with pytest.raises(SystemExit, match="lacks the hidden number"):
        demo.main()
    assert f"{mode} attention LACKS the number 1234567" in capsys.readouterr().out


def test_the_demo_ends_with_the_status_of_a_generate_that_failed(answers, monkeypatch):
    def fail(mode: str) -> None:
        raise subprocess.CalledProcessError(3, "torchrun")

    monkeypatch.setattr(demo, "answer", fail)
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 3


def test_an_answer_is_read_from_the_file_that_generate_wrote(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(demo, "FILES", tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: None)
    (tmp_path / "star.json").write_text(json.dumps(result_of_generate("yes")))
    assert demo.answer("star")["text"] == "yes"
