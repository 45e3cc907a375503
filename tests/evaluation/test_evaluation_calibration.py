"""What is recommended, and when nothing is; and that the promise holds for questions nobody has looked at."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

from megatron_star.config import StarConfig
from megatron_star.evaluation.calibration import default_settings, recommend, summarize
from megatron_star.evaluation.calibration_report import calibration_report
from megatron_star.evaluation.comparison import Comparison, probe_positions
from megatron_star.evaluation.comparison_file import ComparisonFile, read_comparisons
from megatron_star.programs import calibrate as program

SPEEDUPS = {"fast": 4.0, "medium": 2.0, "slow": 1.25, "useless": 1.0}


def comparison(changed: bool, speedup: float) -> Comparison:
    """One setting on one question."""
    return Comparison(
        same_first_token=not changed,
        changed=changed,
        kl=0.5 * changed,
        hidden_mass=0.25,
        exact_ttft_s=speedup,
        ttft_s=1.0,
        exact_flops=1e9 * speedup,
        flops=1e9,
    )


def questions(count: int, **shares: float):
    """So many; each setting changes about its share of the answers, spread evenly."""
    return [
        {
            name: comparison(int((i + 1) * share + 1e-9) > int(i * share + 1e-9), SPEEDUPS[name])
            for name, share in shares.items()
        }
        for i in range(count)
    ]


def test_the_cheapest_setting_within_the_tolerance_is_recommended_with_its_bound():
    verdict = recommend(questions(400, slow=0.0, medium=0.0, fast=0.3, useless=0.0), 0.05)
    assert verdict.setting == "medium"
    assert verdict.bound == pytest.approx(1 - 0.05 ** (1 / 200), abs=1e-6)
    assert "changed 0 of 200 answers that had no part in its choice" in verdict.reason


def test_too_few_questions_support_nothing_and_are_told_how_many_would():
    verdict = recommend(questions(116, slow=0.0), 0.05)
    assert verdict.setting is None
    assert "even if none of the 58 that judge changes, up to 0.050" in verdict.reason
    assert "118 are needed" in verdict.reason
    assert recommend(questions(118, slow=0.0), 0.05).setting == "slow"


def test_a_setting_that_changes_too_much_or_saves_nothing_is_not_recommended():
    verdict = recommend(questions(400, fast=0.3, useless=0.0), 0.05)
    assert verdict.setting is None
    assert "no setting is cheaper than exact and changes at most 4 of the 200 answers that" in verdict.reason


@pytest.mark.parametrize(("changed", "chosen"), [(4, "fast"), (5, "slow")])
def test_a_setting_is_chosen_only_if_it_would_be_confirmed_by_its_own_half(changed, chosen):
    compared = questions(400, fast=0.0, slow=0.0)
    for question in compared[: 2 * changed : 2]:
        question["fast"] = comparison(True, SPEEDUPS["fast"])
    assert recommend(compared, 0.05).setting == chosen


def test_a_candidate_whose_bound_is_above_the_tolerance_is_named_but_not_recommended():
    compared = questions(400, fast=0.0, slow=0.0)
    for question in compared[1:11:2]:
        question["fast"] = comparison(True, SPEEDUPS["fast"])
    verdict = recommend(compared, 0.05)
    assert verdict.setting is None
    assert verdict.bound > 0.05
    assert "'fast' was the candidate, but it changed 5 of 200" in verdict.reason


def test_the_questions_that_choose_do_not_judge():
    compared = questions(400, fast=0.0)
    for question in compared[1::2]:
        question["fast"] = comparison(True, 4.0)
    verdict = recommend(compared, 0.05)
    assert (verdict.setting, verdict.bound) == (None, 1.0)


def test_a_promise_is_broken_in_at_most_one_case_of_twenty():
    generator = random.Random(0)
    shares = {"fast": 0.11, "medium": 0.102, "slow": 0.02}  # of all questions there are; 0.1 is promised
    broken = 0
    for _ in range(300):
        compared = [
            {name: comparison(generator.random() < share, SPEEDUPS[name]) for name, share in shares.items()}
            for _ in range(240)
        ]
        broken += shares.get(recommend(compared, 0.1).setting, 0.0) > 0.1
    assert broken <= 0.05 * 300


def test_a_summary_has_means_and_median_ratios():
    summary = summarize("fast", questions(4, fast=0.5))
    assert (summary.changed_answers, summary.same_first_tokens, summary.kl) == (0.5, 0.5, 0.25)
    assert (summary.ttft_ratio, summary.flops_ratio, summary.hidden_mass) == (4.0, 4.0, 0.25)


def test_probes_are_spread_over_the_context_and_end_with_it():
    assert probe_positions(160)[:2] == [9, 19]
    assert probe_positions(160)[-1] == 159
    assert probe_positions(3) == [0, 1, 2]


def test_default_settings_cut_the_longest_context_in_4_8_and_16_blocks():
    settings = default_settings(4000)
    assert [star.block_size for star in settings.values()] == [1000] * 3 + [500] * 3 + [250] * 3
    assert StarConfig(block_size=500, neighbor_blocks=1) in settings.values()
    assert StarConfig(block_size=250, anchor_size=125) in settings.values()


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


def test_comparisons_are_read_back_and_other_lines_and_settings_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    values = {"fast": comparison(True, 2.0).__dict__}
    record = {"program": "calibrate", "id": "a", "asked": {}, "tokens": [1], "settings": values}
    path.write_text(json.dumps(record) + "\n")
    assert read_comparisons(str(path)) == [{"fast": comparison(True, 2.0)}]
    with ComparisonFile(str(path), "in.jsonl", {"a": {}}) as output:
        output.check_same_settings(["fast"])
        with pytest.raises(ValueError, match="compares other settings"):
            output.check_same_settings(["slow"])
    path.write_text(json.dumps(record | {"settings": {"fast": values["fast"] | {"kl": "0"}}}) + "\n")
    with pytest.raises(ValueError, match="line 1: the field 'settings.fast.kl' is '0': input should be a "):
        read_comparisons(str(path))


@pytest.mark.parametrize("window_size", [None, (9, 0)])
def test_a_context_that_does_not_fit_the_budget_is_refused_before_anything_runs(window_size):
    """Layers with windows keep all tokens here, for what a setting hides is looked for in their keys."""
    shape = {"num_layers": 2, "num_query_groups": 2, "kv_channels": 8, "tensor_model_parallel_size": 1}
    config = SimpleNamespace(**shape, window_size=window_size, params_dtype=torch.float32)
    star_model = SimpleNamespace(model=SimpleNamespace(config=config), exchange=SimpleNamespace(cp_size=2))
    bytes_per_token = 2 * 2 * 2 * 8 * 4
    job = SimpleNamespace(star_model=star_model, budget=50 * bytes_per_token)
    program._check_fits(100, job)
    with pytest.raises(ValueError, match="101 context tokens need 13,056 bytes of KV on a rank, but the"):
        program._check_fits(101, job)


def test_the_report_ends_with_the_advice():
    lines = calibration_report(questions(400, medium=0.0), 0.05).splitlines()
    assert lines[1].split() == ["medium", "100.0%", "0.0%", "0.0000", "0.250", "2.00x", "2.00x"]
    assert lines[-1].startswith("Recommended: medium: it changed 0 of 200 answers")
