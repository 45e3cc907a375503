"""What a calibration asks next, what it has found, and how that reads."""

import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from megatron_star.config import StarConfig
from megatron_star.evaluation.calibration import Calibration, default_settings, summarize
from megatron_star.evaluation.calibration_report import Progress, announcement, calibration_report
from megatron_star.evaluation.comparison import Comparison, ExactAnswer, probe_positions
from megatron_star.evaluation.comparison_file import ComparisonFile
from megatron_star.evaluation.search_cost import SearchCost
from megatron_star.programs import calibrate as program
from megatron_star.programs import calibration_input

OPERATIONS = {"fast": 1.0, "medium": 2.0, "useless": 4.0}
EXACT = ExactAnswer(
    tokens=[1],
    likely=[[1, 2]],
    log_ps=[[-0.1, -3.0]],
    encoding_s=3.0,
    query_s=1.0,
    flops=4.0,
    hidden_masses=dict.fromkeys(OPERATIONS, 0.25),
)


def comparison(setting: str, changed: bool) -> Comparison:
    """One setting on one question."""
    return Comparison(
        same_first_token=not changed,
        changed=changed,
        kl=0.5 * changed,
        ttft_s=OPERATIONS[setting],
        flops=OPERATIONS[setting],
        encoded_as=f"{setting} block_size=1K",
    )


@pytest.fixture
def calibration(tmp_path):
    """120 questions for a tolerance of 0.1, of which nothing is answered yet."""
    questions = [f"q{number}" for number in range(120)]
    cost = SearchCost.of([4.0] * 120, {name: [cost] * 120 for name, cost in OPERATIONS.items()})
    with ComparisonFile(str(tmp_path / "out.jsonl"), "in.jsonl", {name: {} for name in questions}) as output:
        yield Calibration(questions, cost, 0.1, output)


def answer(calibration: Calibration, most: int | None = None, *, ask_all: bool = False) -> list[str]:
    """Answer at most so many of what is asked; what that was. Fast changes all, medium the first question."""
    progress, asked, lines = Progress(calibration), [], []
    asks = calibration.open_asks(ask_all=ask_all)
    while len(asked) != most and (ask := next(asks, None)):
        name = calibration.questions[ask.question]
        asked.append(f"{ask.setting or 'exact'}/{name}")
        if ask.setting:
            changed = ask.setting == "fast" or name == "q0"
            calibration.answers.add(name, ask.setting, comparison(ask.setting, changed))
        else:
            calibration.answers.add_exact(name, EXACT)
        lines.append(progress.line(ask, 1.0))
    answer.lines = lines
    return asked


FIRST = ["exact/q0", "fast/q0", "exact/q2", "fast/q2", "medium/q0", "medium/q2", "exact/q4", "medium/q4"]


def test_exact_is_asked_each_question_once_and_the_candidate_alone_judges(calibration):
    asked = answer(calibration)
    assert len(asked) == len(set(asked)) == 120 + 2 + 120
    assert asked[:8] == FIRST
    assert [name for name in asked if name.startswith("medium")][-1] == "medium/q119"
    verdict = calibration.verdict()
    assert verdict.setting == "medium"
    assert "changed 0 of 60 answers" in verdict.reason


@pytest.mark.parametrize("interrupted_after", [1, 2, 5, 50, 241])
def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been(
    calibration, interrupted_after, tmp_path
):
    before = answer(calibration, interrupted_after)
    copy = shutil.copy(calibration.answers.lines.path, tmp_path / "copy.jsonl")
    questions, asked = calibration.questions, {name: {} for name in calibration.questions}
    with ComparisonFile(str(copy), "in.jsonl", asked) as output:
        again = Calibration(questions, calibration.cost, 0.1, output)
        after = answer(again)
        assert [*before, *after][:8] == FIRST
        assert len({*before, *after}) == len(before) + len(after) == 242
        assert again.verdict().setting == "medium"


def test_to_ask_all_answers_everything_and_decides_as_the_search_does(calibration):
    assert len(answer(calibration, ask_all=True)) == 4 * 120
    assert calibration.verdict().setting == "medium"
    assert summarize("useless", calibration).num_asked == 120


def test_what_it_costs_is_said_before_and_how_far_it_is_behind_each_answer(calibration):
    text = announcement(calibration)
    assert "120 questions, 60 that choose and 60 that judge" in text
    assert "  0.25  fast\n  0.50  medium\n  1.00  useless (not cheaper: left out)\n" in text
    assert "costs from 1.2 to 1.6. To ask every setting everything would cost 2.8" in text
    answer(calibration)
    lines = answer.lines
    assert lines[1].startswith("question 1 of 60 that choose: fast: 1 changed, 1 may; ")
    assert lines[4].startswith(
        "ruled out: fast: more than 1 answers changed\nquestion 1 of 60 that choose: med"
    )
    assert any(line.startswith("candidate: medium: the other half judges it\n") for line in lines)
    assert (
        lines[-1]
        == "question 60 of 60 that judge: medium: 0 changed, 1 may; 0 min to go if it is the one, 0 at most"
    )


def test_a_summary_has_means_and_ratios(calibration):
    answer(calibration)
    fast, medium = summarize("fast", calibration), summarize("medium", calibration)
    assert (fast.num_asked, fast.num_changed, fast.same_first_tokens, fast.kl) == (2, 2, 0.0, 0.5)
    assert (fast.ttft_ratio, fast.flops_ratio, fast.hidden_mass) == (4.0, 4.0, 0.25)
    assert (medium.num_asked, medium.num_changed, medium.kl) == (120, 1, pytest.approx(0.5 / 120))
    assert medium.encoded_as == ["medium block_size=1K"]


def test_the_report_ends_with_the_advice_and_shows_the_sizes_that_were_chosen(calibration):
    answer(calibration)
    lines = calibration_report(calibration).splitlines()
    assert " ".join(lines[2].split()) == "medium 2.00x 1 of 120 (0.8%) 99.2% 0.0042 0.250 2.00x"
    assert lines[3].split() == ["useless", "1.00x", "not", "asked", "-", "-", "0.250", "-"]
    assert "'medium' was 'medium block_size=1K'." in lines
    assert lines[-1].startswith("Recommended: medium: it changed 0 of 60 answers")


def test_probes_are_spread_over_the_context_and_end_with_it():
    assert probe_positions(160)[:2] == [9, 19]
    assert probe_positions(160)[-1] == 159
    assert probe_positions(3) == [0, 1, 2]


def test_default_settings_cut_the_longest_context_in_4_8_16_and_32_blocks():
    recommended, *settings = default_settings(8000).values()
    assert recommended == StarConfig()
    assert [star.block_size for star in settings] == [250] * 3 + [500] * 3 + [1000] * 3 + [2000] * 3
    assert StarConfig(block_size=500, neighbor_blocks=1) in settings
    assert StarConfig(block_size=250, anchor_size=64, passed_keys=63) in settings


@pytest.mark.parametrize("num_tokens", [1, 3, 50, 512, 1000])
def test_default_settings_of_a_short_context_have_no_tiny_blocks_unless_it_is_tiny(num_tokens):
    _, *settings = default_settings(num_tokens).values()
    smallest = min(star.block_size for star in settings)
    assert smallest >= min(128, -(-num_tokens // 4))
    assert len(settings) == len(set(settings))


ARGUMENTS = ["--load", "x", "--input-jsonl", "y", "--output", "z"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--setting", "exact"], "each must begin with star"),
        (["--tolerance", "0"], "'0' is not a share of at least 0.0001"),
        (["--tolerance", "2%"], "'2%' is not a share"),
        (["--setting", "star block=1"], "setting 'star block=1'"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        program.parse_arguments([*ARGUMENTS, *options])


def test_answers_are_read_back_and_other_lines_and_settings_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with ComparisonFile(str(path), "in.jsonl", {"a": {"dtype": "float32"}}) as output:
        output.add_exact("a", EXACT)
        output.add("a", "fast", comparison("fast", True))
    with ComparisonFile(str(path), "in.jsonl", {"a": {"dtype": "float32"}}) as output:
        assert output.exact == {"a": EXACT}
        assert output.comparisons == {"fast": {"a": comparison("fast", True)}}
        output.check_same_settings(OPERATIONS)
        with pytest.raises(ValueError, match="compares other settings"):
            output.check_same_settings(["slow"])
    with pytest.raises(ValueError, match="'a' was asked with another dtype"):
        ComparisonFile(str(path), "in.jsonl", {"a": {"dtype": "bfloat16"}})
    with pytest.raises(ValueError, match=r"has the question 'a', which in.jsonl lacks"):
        ComparisonFile(str(path), "in.jsonl", {"b": {}})
    line = json.loads(path.read_text().splitlines()[1])
    wrong = line["comparison"] | {"kl": "0"}
    path.write_text(json.dumps(line | {"comparison": wrong}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: the field 'comparison.kl' is '0': input should be a "):
        ComparisonFile(str(path), "in.jsonl", {"a": {}})
    path.write_text(json.dumps(line | {"exact": asdict(EXACT)}) + "\n")
    with pytest.raises(ValueError, match="'fast/a' has to be exact's answer or a comparison"):
        ComparisonFile(str(path), "in.jsonl", {"a": {"dtype": "float32"}})


def test_too_few_questions_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_input, "of_model", lambda args: {})
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"context": "a", "query": "b"}) for _ in range(10)))
    command = ["--load", "x", "--input-jsonl", str(path), "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(ValueError, match=r"118 are needed; --ask-all compares the settings without a prom"):
        calibration_input.read_input(program.parse_arguments(command), None)


@pytest.mark.parametrize("window_size", [None, (9, 0)])
def test_a_context_that_does_not_fit_the_budget_is_refused_before_anything_runs(window_size):
    """Layers with windows keep all tokens here, for what a setting hides is looked for in their keys."""
    shape = {"num_layers": 2, "num_query_groups": 2, "kv_channels": 8, "tensor_model_parallel_size": 1}
    config = SimpleNamespace(**shape, window_size=window_size, params_dtype=torch.float32)
    star_model = SimpleNamespace(
        model=SimpleNamespace(config=config),
        exchange=SimpleNamespace(cp_size=2),
        kv_format=SimpleNamespace(name="auto"),
    )
    bytes_per_token = 2 * 2 * 2 * 8 * 4
    job = SimpleNamespace(star_model=star_model, budget=50 * bytes_per_token)
    calibration_input._check_fits(100, job)
    with pytest.raises(ValueError, match="101 context tokens need 13,056 bytes of KV on a rank, but the"):
        calibration_input._check_fits(101, job)
