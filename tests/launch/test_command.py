"""The installed command `megatron-star`, as a process in an empty folder."""

import pytest
from programs import error_lines, megatron_star


def test_a_converted_model_is_planned_for(checkpoints, tmp_path):
    hf, _ = checkpoints("llama")
    converted = megatron_star("convert", "--hf", hf, "--output", "converted", folder=tmp_path)
    assert (converted.returncode, error_lines(converted.stderr)) == (0, [])
    planned = megatron_star("plan", "--model", "converted", "--context", "1K", "--gpus", 1, folder=tmp_path)
    assert planned.returncode == 0
    assert "1,024 context tokens" in planned.stdout


@pytest.mark.parametrize("program", ["generate", "serve"])
def test_a_missing_checkpoint_is_one_line_and_status_2(program, tmp_path):
    asked = ["--context-file", "c.txt", "--query", "why"] if program == "generate" else ["--port", 0]
    ended = megatron_star(program, "--load", "nowhere", *asked, folder=tmp_path)
    assert ended.returncode == 2
    assert error_lines(ended.stderr) == ["error: nowhere: no such directory"]
    assert "Traceback" not in ended.stderr


def test_help_names_the_command_that_was_typed(tmp_path):
    finished = megatron_star("calibrate", "--help", folder=tmp_path)
    assert finished.stdout.startswith("usage: megatron-star calibrate ")
