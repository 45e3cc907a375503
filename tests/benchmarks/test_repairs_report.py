"""What repairs.py writes is continued, and its report compares what was measured on the same samples."""

import json
from pathlib import Path

import pytest

from benchmarks import repairs
from benchmarks.repair_candidates import Candidate
from benchmarks.repair_defaults import DEFAULT
from benchmarks.repair_laboratory import Laboratory
from benchmarks.repair_picture import COLORS, family
from benchmarks.repair_report import Measured, figures_by_length, read_measured, table_rows, winner

STAR, PASSED = "star blocks=4", "star blocks=4 anchor=8 passed=8"
PNG = b"\x89PNG"


def measured(candidate: str, index: int, **changes) -> Measured:
    values = {
        "sample": f"needle/512/0/{index}",
        "candidate": candidate,
        "task": "needle",
        "length": 512,
        "depth": 0.5,
        "num_tokens": 500,
        "layers": "",
        "right": True,
        "log_probability": -1.0,
        "pairs": 0.5,
        "operations": 60.0,
        "exact_operations": 100.0,
        "star_operations": 50.0,
        "crossing_bytes": 3_000_000,
        "seconds": 2.0,
        **changes,
    }
    return Measured(id=f"{values['sample']} {candidate}", **values)


def written(path: Path, records: list[Measured], model: str = "m") -> Path:
    lines = [
        r.to_json() | {"program": "repairs", "asked": {"model": model, "dtype": "bfloat16"}} for r in records
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def figures(records: list[Measured]):
    return {str(f.candidate): f for f in figures_by_length(records)[512]}


def test_kept_is_a_mean_over_tasks_of_what_exact_has_right():
    records = [
        *(measured("exact", i, task="a") for i in range(4)),
        *(measured(STAR, i, task="a", right=i < 1) for i in range(4)),
        *(measured("exact", i, task="b", right=i != 5) for i in range(4, 6)),
        *(measured(STAR, i, task="b", right=i != 5) for i in range(4, 6)),
    ]
    star = figures(records)[STAR]
    assert star.kept == pytest.approx((1 / 4 + 1 / 2) / (1 + 1 / 2))
    low, high = star.interval
    assert 0 <= low < star.kept < high <= 1.01
    assert star.to_exact == 0.6 and star.to_star == 1.2 and star.num_samples == 6


def test_candidates_are_compared_on_the_samples_that_exact_was_measured_on():
    records = [measured("exact", i) for i in (1, 2)]
    records += [measured(STAR, i, right=i != 0, log_probability=-5.0 * (i == 0)) for i in (0, 1)]
    star = figures(records)[STAR]
    assert star.num_samples == 1 and star.kept == 1.0 and star.log_probability == 0.0
    assert STAR not in figures([measured("exact", 1), measured(STAR, 0)])


def test_log_probabilities_are_of_samples_that_exact_solves():
    records = [measured("exact", 0), measured("exact", 1, right=False, log_probability=-9.0)]
    records += [measured(STAR, i, log_probability=-3.0 - i) for i in (0, 1)]
    star = figures(records)[STAR]
    assert (star.log_probability, star.exact_log_probability) == (-3.0, -1.0)


def test_where_exact_solves_nothing_nothing_can_be_kept():
    records = [measured("exact", 0, right=False), measured(STAR, 0)]
    star = figures(records)[STAR]
    assert star.kept is None and star.log_probability is None
    assert table_rows([star])[1][2:4] == ["-", "-"]


def test_the_best_is_the_cheapest_of_those_that_keep_enough():
    records = [measured("exact", 0, operations=100.0), measured(STAR, 0, operations=50.0, right=False)]
    records += [measured(PASSED, 0, operations=55.0), measured(f"{PASSED} halving=1", 0, operations=52.0)]
    found = list(figures(records).values())
    assert str(winner(found, 0.97).candidate) == f"{PASSED} halving=1"
    assert winner(found[1:2], 0.97) is None
    assert winner(found, 0.97, "star  blocks=4").candidate == Candidate.parse(STAR)


def test_every_default_candidate_but_exact_is_of_a_family_that_is_drawn():
    assert {family(Candidate.parse(text)) for text in DEFAULT if text != "exact"} == set(COLORS) - {"exact"}


def test_files_of_several_shards_are_one_report(tmp_path, capsys):
    first = written(tmp_path / "0", [measured("exact", 0), measured(STAR, 0, right=False)])
    second = written(tmp_path / "1", [measured("exact", 1), measured(STAR, 1)])
    picture = tmp_path / "p.png"
    repairs.report(repairs.parse_arguments(["--report", str(first), str(second), "--picture", str(picture)]))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(STAR))
    assert " ".join(row.split()[2:]) == "2 50% [0-100] -1.00 / -1.00 0.500 0.600 / 1.200 3.0 2.0"
    assert picture.read_bytes().startswith(PNG)


def test_records_that_are_there_twice_or_of_two_models_are_refused(tmp_path):
    first = written(tmp_path / "0", [measured("exact", 0)])
    with pytest.raises(ValueError, match="twice"):
        read_measured([first, first])
    with pytest.raises(ValueError, match="another model"):
        read_measured([first, written(tmp_path / "1", [measured("exact", 1)], model="other")])


@pytest.mark.parametrize("shard", ["2/2", "1", "3/2", "a/b", "0/0"])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(ValueError, match="0/2"):
        repairs.parse_arguments(["--hf", "x", "--output", "y", "--shard", shard])


@pytest.mark.parametrize(
    "options", [[], ["--hf", "x"], ["--output", "y"], ["--report", "z", "--hf", "x", "--output", "y"]]
)
def test_a_run_measures_or_reports(options):
    with pytest.raises(ValueError, match="--report"):
        repairs.parse_arguments(options)


@pytest.mark.smollm2
def test_a_run_that_was_interrupted_goes_on_where_it_was(smollm2, tmp_path, monkeypatch):
    """Two shards have different samples; a torn line is measured again, and a finished run loads no model."""

    def run(shard: str, *candidates: str) -> list[str]:
        output = tmp_path / shard[0]
        options = ["--hf", str(smollm2.hf), "--length", "256", "--samples", "2", "--tasks", "niah_single_1"]
        options += ["--shard", shard, "--output", str(output), "--candidates", *candidates]
        repairs.measure(repairs.parse_arguments(options))
        return output.read_text().splitlines()

    whole = run("0/2", "exact", STAR)
    other = run("1/2", "exact")
    assert [json.loads(line)["sample"][-1] for line in (*whole, *other)] == ["0", "0", "1"]
    exact, star = map(json.loads, whole)
    assert exact["right"] and exact["pairs"] == 1.0 and star["pairs"] < 0.7
    assert exact["log_probability"] != star["log_probability"]

    (tmp_path / "0").write_text(f"{whole[0]}\n{whole[1][:50]}")
    again = run("0/2", "exact", STAR)
    assert again[0] == whole[0]
    assert json.loads(again[1])["log_probability"] == star["log_probability"]
    monkeypatch.setattr(Laboratory, "open", None)
    assert run("0/2", STAR) == again
