"""The GPU check runs here as far as a CPU can, loses nothing that it has found, and its tables are true."""

import json
import subprocess
import sys
from pathlib import Path
from time import sleep

import pytest
from distributed import run_ranks

sys.path.append(str(Path(__file__).parent))
import benchmark_ranks  # noqa: E402

from benchmarks.gpu.check import STAGES, main  # noqa: E402
from benchmarks.gpu.gpu_tables import COLUMNS, read_figures, tables  # noqa: E402

REPOSITORY = Path(__file__).parents[2]


def figures_of(output: Path, *arguments: str, merge: str = "as it is") -> tuple[int, list[dict]]:
    """Exit status and lines of a check of one rank."""
    [status] = run_ranks(1, benchmark_ranks.gpu_check, output, arguments, merge)
    return status, read_figures(output)


def test_every_stage_runs_on_a_cpu_and_has_its_table(tmp_path):
    status, rows = figures_of(tmp_path / "check.jsonl", "--unit", "16")
    assert status == 0 and not [row for row in rows if "error" in row]
    assert [row["stage"] for row in rows if row["name"] == "done"] == list(STAGES)
    report = tables(tmp_path / "check.jsonl")
    for stage in COLUMNS.keys() - {"memory", "graph"}:
        assert f"| {stage} |" in report
    dense = [row for row in rows if row["name"].startswith("dense forward")]
    assert dense[0]["relative_error"] < 1e-4 and all(row["same_tokens"] == 1.0 for row in dense)
    assert all(row["failed"] == 0 for row in rows if "failed" in row)


def test_a_rank_of_many_receives_what_the_others_own(tmp_path):
    """1M of 128 units in blocks of 4 over 8 ranks: the anchor's 64 tokens, of 2 layers but the last."""
    _, rows = figures_of(tmp_path / "check.jsonl", "--unit", "16", "--stages", "ranks")
    kv_of_a_token = 2 * 2 * 32 * 2  # keys and values of 2 heads of 32 in 16 bits
    found = {row["name"]: row for row in rows if "received_mb" in row}
    star = found["tiny: 2K broadcast, rank 0 of 8"]
    assert star["sent_mb"] * 1e6 == 64 * kv_of_a_token and star["received_mb"] == 0
    other = next(row for name, row in found.items() if "2K broadcast, rank 1 of 8" in name)
    assert other["received_mb"] * 1e6 == 64 * kv_of_a_token and other["sent_mb"] == 0
    assert found["tiny: 2K recompute, rank 0 of 8"]["received_mb"] == 0
    exact = found["tiny: 2K exact, rank 0 of 8"]
    assert (exact["sent_mb"] + exact["received_mb"]) * 1e6 == pytest.approx(2048 * kv_of_a_token, rel=0.1)


def test_a_stage_that_raises_leaves_the_figures_before_and_after_it(tmp_path):
    arguments = ("--stages", "machine,merge,load")
    status, rows = figures_of(tmp_path / "check.jsonl", *arguments, merge="raises")
    assert status == 1
    names = [(row["stage"], row["name"]) for row in rows]
    assert ("merge", "before") in names and ("load", "done") in names and ("merge", "done") not in names
    errors = {row["name"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        "raises": "RuntimeError: planted in a figure",
        "failed": "RuntimeError: planted in a stage",
    }
    assert "- merge, raises: RuntimeError: planted in a figure" in tables(tmp_path / "check.jsonl")


def test_a_spent_budget_ends_a_stage_and_leaves_out_the_rest(tmp_path):
    arguments = ("--stages", "machine,merge,load", "--budget", "3.5")
    status, rows = figures_of(tmp_path / "check.jsonl", *arguments, merge="hangs")
    assert status == 1 and rows[0]["stage"] == "machine"
    ends = {row["stage"]: row for row in rows if row["name"] in ("failed", "not run")}
    assert ends["merge"]["error"] == "OutOfTime: the budget is spent"
    assert ends["load"]["left_out"] == "the budget is spent"


def test_a_check_that_is_killed_leaves_what_it_had(tmp_path):
    output = tmp_path / "check.jsonl"
    options = ["--device", "cpu", "--model", "tiny", "--output", str(output)]
    options += ["--stages", "machine,kernels,attention", "--unit", "1024"]  # the last takes seconds
    command = [sys.executable, "scripts/gpu_check.py", *options]
    check = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        while check.poll() is None and (not output.exists() or output.read_text().count("\n") < 3):
            sleep(0.05)
    finally:
        check.kill()
        check.wait()
    found = [(row["stage"], row["name"]) for row in read_figures(output)]
    assert ("machine", "machine") in found and found[-1][0] != "machine"
    assert ("attention", "done") not in found, "it kept its figures to the end"


def test_a_torn_last_line_is_left_out_and_another_file_is_refused_by_name(tmp_path):
    file = tmp_path / "check.jsonl"
    file.write_text(json.dumps({"stage": "hf", "name": "x", "s": 1.0}) + '\n{"stage": "hf", "na')
    assert tables(file) == "| hf | s |\n|---|---|\n| x | 1 |"
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="check.jsonl: line 1 is no figure of gpu_check.py"):
        tables(file)


def test_without_a_gpu_nothing_is_said_to_have_run(capsys):
    assert main(["--stages", "machine"]) == 1
    assert capsys.readouterr().err.startswith("error: no CUDA GPU here: nothing was run")


def test_a_benchmark_that_breaks_off_leaves_its_finished_rounds(tmp_path):
    run_ranks(1, benchmark_ranks.rounds_until_it_breaks, tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["rounds"], result["summary"]) == ([1.0, 3.0], 4.0)
