"""Whom a calibration asks what; and that its promise holds for questions that nobody has looked at."""

import random
from collections import Counter

import pytest

from megatron_star.evaluation.search import Ask, Verdict, halves, search
from megatron_star.evaluation.search_cost import SearchCost
from megatron_star.evaluation.statistics import most_hits, share_upper_bound


def searched(changed: dict[str, list[bool]], tolerance: float) -> tuple[Verdict, list[Ask]]:
    """The verdict on settings, cheapest first, that change these answers; and all that was asked for it."""
    (num_questions,) = set(map(len, changed.values()))
    asking, asks = search(changed, num_questions, tolerance), []
    try:
        asks.append(next(asking))
        while True:
            asks.append(asking.send(changed[asks[-1].setting][asks[-1].question]))
    except StopIteration as ended:
        return ended.value, asks


def answers(count: int, choosing: int, judging: int) -> list[bool]:
    """So many answers, the first so many of each half changed."""
    return [question // 2 < (judging if question % 2 else choosing) for question in range(count)]


def test_the_cheapest_setting_within_the_tolerance_is_recommended_with_its_bound():
    changed = {"fast": answers(400, 60, 60), "medium": answers(400, 0, 0), "slow": answers(400, 0, 0)}
    verdict, _ = searched(changed, 0.05)
    assert verdict.setting == "medium"
    assert verdict.bound == pytest.approx(1 - 0.05 ** (1 / 200), abs=1e-6)
    assert "changed 0 of 200 answers that had no part in its choice" in verdict.reason


def test_too_few_questions_support_nothing_and_are_told_how_many_would():
    verdict, asks = searched({"slow": answers(116, 0, 0)}, 0.05)
    assert (verdict.setting, asks) == (None, [])
    assert "even if none of the 58 that judge changes, up to 0.050" in verdict.reason
    assert "118 are needed" in verdict.reason
    assert searched({"slow": answers(118, 0, 0)}, 0.05)[0].setting == "slow"


def test_if_no_setting_gets_through_nothing_is_judged():
    verdict, asks = searched({"fast": answers(400, 60, 0)}, 0.05)
    assert verdict.setting is None
    assert "no setting is cheaper than exact and changes at most 4 of the 200 answers that" in verdict.reason
    assert not any(ask.judges for ask in asks)
    assert searched({"fast": answers(400, 60, 0), "slow": answers(400, 60, 0)}, 0.05)[0] == verdict


@pytest.mark.parametrize(("changed", "chosen"), [(4, "fast"), (5, "slow")])
def test_a_setting_is_chosen_only_if_it_would_be_confirmed_by_its_own_half(changed, chosen):
    verdict, _ = searched({"fast": answers(400, changed, 0), "slow": answers(400, 0, 0)}, 0.05)
    assert verdict.setting == chosen


@pytest.mark.parametrize(("changed", "kept"), [(4, True), (5, False)])
def test_a_candidate_that_is_not_confirmed_is_named_and_no_other_is_judged(changed, kept):
    verdict, asks = searched({"fast": answers(400, 0, changed), "slow": answers(400, 0, 0)}, 0.05)
    assert (verdict.setting == "fast") == kept
    assert {ask.setting for ask in asks} == {"fast"}
    if not kept:
        assert verdict.bound is None
        assert "'fast' was the candidate, but it changed more than 4 of 200" in verdict.reason


def test_a_setting_that_is_ruled_out_is_asked_no_further_and_dearer_ones_than_the_candidate_never():
    changed = {"bad": [True] * 400, "good": answers(400, 0, 0), "dear": answers(400, 0, 0)}
    _, asks = searched(changed, 0.05)
    assert Counter((ask.setting, ask.judges) for ask in asks) == {
        ("bad", False): 5,
        ("good", False): 200,
        ("good", True): 200,
    }
    assert [ask.num_changed for ask in asks if ask.setting == "bad"] == [0, 1, 2, 3, 4]


def test_judging_ends_early_only_where_no_promise_can_be_made_any_more():
    _, asks = searched({"good": answers(400, 0, 4)}, 0.05)
    assert sum(ask.judges for ask in asks) == 200
    _, asks = searched({"good": answers(400, 0, 200)}, 0.05)
    assert sum(ask.judges for ask in asks) == 5


def verdict_of_all(changed: dict[str, list[bool]], tolerance: float) -> str | None:
    """The slow twin: every setting has answered everything."""
    for setting, of in changed.items():
        choosing, judging = of[::2], of[1::2]
        if share_upper_bound(sum(choosing), len(choosing)) <= tolerance:
            return setting if share_upper_bound(sum(judging), len(judging)) <= tolerance else None
    return None


def simulated(generator: random.Random, shares: dict[str, float], count: int) -> dict[str, list[bool]]:
    """Answers that settings change with these shares, mostly on the same questions, as real ones do."""
    difficulties = [generator.random() for _ in range(count)]
    return {
        name: [
            (difficulty if generator.random() < 0.5 else generator.random()) < share
            for difficulty in difficulties
        ]
        for name, share in shares.items()
    }


def test_the_verdict_is_the_same_as_if_every_setting_had_answered_everything():
    generator, verdicts = random.Random(1), Counter()
    for _ in range(300):
        shares = {name: generator.choice((0.0, 0.04, 0.06, 0.1, 0.3)) for name in "abcd"}
        count, tolerance = generator.choice((90, 121, 200)), generator.choice((0.08, 0.1, 0.2))
        changed = simulated(generator, shares, count)
        expected = verdict_of_all(changed, tolerance)
        assert searched(changed, tolerance)[0].setting == expected
        verdicts[expected] += 1
    assert min(verdicts[name] for name in ("a", "b", "c", None)) > 10


@pytest.mark.parametrize("dearest", [0.11, 0.02])
def test_a_promise_is_broken_in_at_most_one_calibration_of_twenty(dearest):
    generator, broken, kept = random.Random(0), 0, 0
    # Many settings, each a little worse than promised: one of them looks good enough, by chance.
    shares = {f"bad {i}": 0.102 + 0.001 * i for i in range(16)} | {"dearest": dearest}
    for _ in range(600):
        setting = searched(simulated(generator, shares, 240), 0.1)[0].setting
        broken += shares.get(setting, 0.0) > 0.1
        kept += shares.get(setting, 1.0) <= 0.1
    assert broken <= 0.05 * 600
    assert kept > 200 or dearest > 0.1


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 10, 60, 121])
def test_so_many_hits_are_within_a_share_and_one_more_is_not(count, share):
    most = most_hits(count, share)
    assert most < 0 or share_upper_bound(most, count) <= share + 1e-8
    assert most + 1 == count or share_upper_bound(most + 1, count) > share - 1e-8


COST = SearchCost.of([10.0] * 6, {"dear": [9.0] * 6, "none": [11.0] * 6, "cheap": [2.0] * 6})


def test_settings_are_asked_by_their_cost_and_those_that_save_nothing_are_not():
    assert list(COST.settings) == ["cheap", "dear", "none"]
    assert COST.cheaper_than_exact() == ["cheap", "dear"]
    assert COST.relative("dear") == 0.9


def test_what_a_search_costs_is_between_its_least_and_its_most():
    assert COST.least() == pytest.approx(1 + 0.2)
    assert COST.most() == pytest.approx(1 + 0.2 / 2 + 0.9)
    assert COST.asked_all() == pytest.approx(1 + 0.2 + 0.9 + 1.1)
    assert SearchCost.of([10.0] * 6, {"none": [11.0] * 6}).most() == 0


def test_what_is_to_go_ends_with_nothing_and_begins_with_the_least_and_the_most():
    answered: set[tuple[int, str | None]] = set()

    def to_go(*ask) -> tuple[float, float]:
        return COST.to_go(Ask(*ask, 0, 0, 0), lambda *place: place not in answered)

    assert to_go("cheap", 0, False) == pytest.approx((60 * COST.least(), 60 * COST.most()))
    choosing, judging = halves(6)
    answered |= {(question, None) for question in range(6)} | {(question, "cheap") for question in choosing}
    assert to_go("dear", 0, False) == (6 * 9.0, 6 * 9.0)
    assert to_go("cheap", 1, True) == (3 * 2.0, 3 * 2.0)
    answered |= {(question, "cheap") for question in judging}
    assert to_go("cheap", 5, True) == (0, 0)
