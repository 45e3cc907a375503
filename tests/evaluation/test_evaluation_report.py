"""Tables and pictures of answers that are written by hand."""

import json
import random
import subprocess
import sys

import pytest
from mutations import mutated, with_a_wrong_value

from megatron_star.evaluation.pictures import draw_heat_map, draw_speed
from megatron_star.evaluation.results import ScoredAnswer, ScoreTable, read_answers
from megatron_star.evaluation.score_tables import markdown, plain_text, table_rows
from megatron_star.programs import report as report_program

STAR = "star block_size=1K"


def answer(setting: str, index: int, score: float, *, task="niah_single_1", length=4096, **changes):
    """One answer of this setting."""
    sample = f"{task}/{length}/0/{index}"
    values = {
        "id": f"{setting}/{sample}",
        "sample": sample,
        "setting": setting,
        "model": "m",
        "chat": True,
        "task": task,
        "length": length,
        "seed": 0,
        "index": index,
        "depth": 0.1 * index,
        "references": ["1"],
        "text": "1",
        "tokens": [1],
        "score": score,
        "num_context_tokens": length - 100,
        "num_query_tokens": 50,
        "num_blocks": 4,
        "encoded_as": setting,
        "seconds": 2.0 if setting == "exact" else 1.0,
        "encoding_flops": 3e9 if setting == "exact" else 1e9,
        "cache_hit": False,
    }
    return ScoredAnswer(**values | changes)


ANSWERS = [
    *(answer("exact", i, 1.0) for i in range(4)),
    *(answer(STAR, i, float(i > 0)) for i in range(4)),
    *(answer("exact", i, 0.25, task="variable_tracking") for i in range(4)),
    *(answer(STAR, i, 0.5, task="variable_tracking") for i in range(4)),
]


def write(path, answers):
    path.write_text("".join(json.dumps(a.to_json()) + "\n" for a in answers))
    return path


def test_a_table_has_the_means_with_intervals_and_exact_first():
    rows = table_rows(ScoreTable(reversed(ANSWERS)))
    assert rows[0] == ["task", "length", "samples", "exact", STAR]
    assert rows[1] == ["niah_single_1", "4,096", "4", "100.0 [51-100]", "75.0 [30-95]"]
    assert rows[2] == ["variable_tracking", "4,096", "4", "25.0 [5-70]", "50.0 [15-85]"]


def test_what_exact_does_not_solve_has_no_part_in_the_share_that_is_kept():
    table = ScoreTable(ANSWERS)
    assert table.solved_cells(STAR) == [("niah_single_1", 4096)]
    assert table.kept(STAR)[0] == 0.75
    assert table.kept("exact") == (1.0, 1.0, 1.0)
    assert table.mean_score(STAR) == 0.75


def test_settings_are_compared_on_the_samples_that_all_have_answered():
    table = ScoreTable([*ANSWERS, answer("exact", 9, 0.0)])
    assert table.scores(("niah_single_1", 4096), "exact") == [1.0] * 4


def test_a_setting_that_was_not_run_on_a_cell_has_a_dash_there():
    rows = table_rows(ScoreTable([*ANSWERS, answer("exact", 0, 1.0, length=1024)]))
    assert rows[1][-2:] == ["100.0 [21-100]", "-"]


def test_the_speedup_is_the_median_and_leaves_out_cached_contexts():
    slow = answer("exact", 0, 1.0, length=512)
    fast = answer(STAR, 0, 1.0, length=512, seconds=1e-9, cache_hit=True)
    assert ScoreTable([*ANSWERS, slow, fast]).speedup(STAR) == (2.0, 3.0)
    assert ScoreTable([slow, fast]).speedup(STAR) is None


def test_what_was_chosen_for_a_setting_is_said_below_the_table():
    chosen = [
        answer("star", i, 1.0, length=length, encoded_as=f"star block_size={length // 16}")
        for i, length in enumerate((4096, 4096, 8192))
    ]
    text = report_program.report([*ANSWERS, *chosen], "text")
    assert text.splitlines()[-1] == "'star' was 'star block_size=256' or 'star block_size=512'."
    assert "was" not in report_program.report(ANSWERS, "text").splitlines()[-1]


def test_without_exact_there_is_nothing_to_compare_with():
    table = ScoreTable([a for a in ANSWERS if a.setting == STAR])
    assert table.kept(STAR) is None
    assert table_rows(table)[-1][-1] == table_rows(table)[-2][-1] == "-"


def test_text_is_aligned_and_markdown_has_a_rule():
    rows = table_rows(ScoreTable(ANSWERS))
    lines = plain_text(rows).splitlines()
    assert len({line.index("4,096") for line in lines[1:3]}) == 1
    assert markdown(rows).splitlines()[:2] == [
        f"| task | length | samples | exact | {STAR} |",
        "|---|---|---|---|---|",
    ]


def test_answers_survive_their_file_and_a_torn_last_line_is_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", ANSWERS)
    with path.open("a") as file:
        file.write('{"id": "exa')
    assert read_answers([path]) == ANSWERS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("notes", "line 17: not JSON"),
        ("{}", "line 17: not an answer of `megatron-star eval`: the field 'id' is missing"),
        (json.dumps(ANSWERS[0].to_json() | {"score": "1"}), "the field 'score' is '1': input should be"),
        (json.dumps(ANSWERS[0].to_json() | {"score": 1.5}), "the field 'score' is 1.5: input should be"),
        (json.dumps(ANSWERS[0].to_json() | {"seconds": 0}), "the field 'seconds' is 0: input should be"),
    ],
)
def test_a_line_of_something_else_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", ANSWERS)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_answers([path])


def test_an_answer_in_two_files_is_refused(tmp_path):
    paths = [write(tmp_path / name, ANSWERS) for name in "ab"]
    with pytest.raises(ValueError, match=r"b, line 1: the answer .* occurs twice"):
        read_answers(paths)


def test_pictures_are_drawn(tmp_path):
    draw_heat_map(ANSWERS, tmp_path / "heat.png")
    draw_speed(ScoreTable(ANSWERS), tmp_path / "speed.png")
    for name in ("heat.png", "speed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_that_would_be_empty_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no answer has a depth"):
        draw_heat_map([answer("exact", 0, 1.0, depth=None)], tmp_path / "heat.png")
    with pytest.raises(ValueError, match="nothing to compare with"):
        draw_speed(ScoreTable([answer(STAR, 0, 1.0)]), tmp_path / "speed.png")


def run_report(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_star.programs.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_prints_the_table_of_some_tasks_and_draws(tmp_path):
    path = write(tmp_path / "a.jsonl", ANSWERS)
    options = ["--tasks", "niah_single_1", "--format", "markdown", "--heat-map", tmp_path / "heat.png"]
    run = run_report(path, *options)
    assert run.returncode == 0, run.stderr
    assert "| niah_single_1 | 4,096 | 4 | 100.0 [51-100] | 75.0 [30-95] |" in run.stdout
    assert "variable_tracking" not in run.stdout
    assert (tmp_path / "heat.png").exists()


def test_a_picture_takes_the_place_of_a_picture_and_of_nothing_else(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ANSWERS)
    before = path.read_bytes()
    (tmp_path / "link.png").symlink_to(path)
    (tmp_path / "notes.png").write_text("my notes")
    wrong = {
        "a.jsonl": "is what this report reads",
        "link.png": "is what this report reads",
        "notes.png": "exists, and is no PNG",
        "no/speed.png": "there is no folder",
        ".": "exists, and is no PNG",
    }
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            report_program.run(report_program.parse_arguments([str(path), "--speed", str(tmp_path / name)]))
    assert (path.read_bytes(), (tmp_path / "notes.png").read_text()) == (before, "my notes")
    assert capsys.readouterr().out == ""
    for _ in range(2):
        report_program.run(report_program.parse_arguments([str(path), "--speed", str(tmp_path / "speed")]))
    assert f"{tmp_path / 'speed'}: accuracy against speed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--heat-map and --speed are both x.png"):
        report_program.parse_arguments([str(path), "--speed", "x.png", "--heat-map", "x.png"])


def test_a_thousand_damaged_files_of_answers_are_drawn_or_refused_by_name(tmp_path, capsys):
    generator, lines = random.Random(0), [json.dumps(a.to_json()).encode() + b"\n" for a in ANSWERS]
    refused = 0
    for number in range(1000):
        damaged = list(lines)
        place = generator.randrange(len(damaged))
        if number % 2:
            damaged[place] = mutated(damaged[place], generator)
        else:
            values = with_a_wrong_value(ANSWERS[place].to_json(), generator)
            damaged[place] = json.dumps(values).encode() + b"\n"
        (tmp_path / "a").write_bytes(b"".join(damaged))
        try:
            report_program.run(report_program.parse_arguments([str(tmp_path / "a")]))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(tmp_path / "a"))
    assert refused > 500


def test_mistakes_are_reported_in_one_line(tmp_path, monkeypatch):
    run = run_report(tmp_path / "none.jsonl")
    assert (run.returncode, run.stderr) == (2, f"error: {tmp_path}/none.jsonl: No such file or directory\n")
    args = report_program.parse_arguments([str(write(tmp_path / "a", ANSWERS)), "--tasks", "other"])
    with pytest.raises(ValueError, match="no answers"):
        report_program.run(args)


def test_a_missing_matplotlib_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "megatron_star.evaluation.pictures")
    with pytest.raises(ValueError, match=r"pip install 'megatron-star\[eval\]'"):
        report_program.pictures()
