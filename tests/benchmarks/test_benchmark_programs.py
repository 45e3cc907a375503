"""The benchmarks still run, and their peers compute the same thing. Not how fast."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "launch"))
from programs import python, torchrun  # noqa: E402

from benchmarks import sampling  # noqa: E402
from benchmarks.run import PARTS  # noqa: E402
from benchmarks.tables import AIMS, draw, write_figures  # noqa: E402


def result_of(finished, output: Path) -> dict:
    assert finished.returncode == 0, finished.stderr
    return json.loads(output.read_text())


def test_context_encoding_reports_ratios_floors_and_agreement_with_the_cost_model(checkpoints, tmp_path):
    output = tmp_path / "encoding.json"
    arguments = ["--num-tokens", 512, "--block-size", 64, "--repeats", 1, "--output", output]
    finished = torchrun(2, "benchmarks/context_encoding.py", "--load", checkpoints("llama")[1], *arguments)
    result = result_of(finished, output)

    checks = result["summary"].pop("cost model")
    assert list(result["summary"]) == list(checks)
    assert result["summary"]["star, broadcast"]["to_broadcast"] == 1.0
    for check in checks.values():
        assert check["bytes_counted"] == check["bytes_predicted"]
        assert check["linear_operations"] == pytest.approx(1.0)
        assert check["attention_operations"] == pytest.approx(1.0)
    assert "bytes equal" in finished.stdout and result["machine"]


def test_one_rank_transformers_and_megatron_find_the_same_first_token(checkpoints, tmp_path):
    hf, megatron = checkpoints("llama")
    output = tmp_path / "one_rank.json"
    arguments = ["--load", megatron, "--hf", hf, "--num-tokens", 600, "--repeats", 1, "--megatron"]
    summary = result_of(python("benchmarks/one_rank.py", *arguments, "--output", output), output)["summary"]
    assert len(summary) == 3 and all(peer["same_token"] for peer in summary.values())


def test_one_rank_is_compared_with_transformers_alone_and_not_with_itself(tmp_path):
    output = tmp_path / "decode.json"
    load = ["--load", "-", "--random-model", "tiny", "--hf", "random", "--output", output]
    finished = python("benchmarks/decode.py", *load, "--num-tokens", 256, "--repeats", 2, "--num-steps", 2)
    result = result_of(finished, output)
    assert list(result["summary"]) == ["one rank", "hugging face"] and len(result["rounds"]) == 2


def test_window_layers_are_compared_with_full_attention_and_with_transformers(tmp_path):
    output = tmp_path / "windows.json"
    load = ["--load", "-", "--random-model", "tiny-gemma-3", "--fp32", "--output", output]
    arguments = ["--num-tokens", 600, "--block-size", 100, "--repeats", 1]
    summary = result_of(python("benchmarks/window_layers.py", *load, *arguments), output)["summary"]
    assert len(summary) == 5 and summary["transformers"]["to_windows"] > 0
    assert summary["windows, exact"]["kv_mb"] < 0.4 * summary["full, exact"]["kv_mb"]


def test_experts_over_ranks_are_compared_with_all_experts_on_each_rank(tmp_path):
    output = tmp_path / "experts.json"
    load = ["--load", "-", "--random-model", "tiny-qwen3-moe", "--fp32", "--expert-model-parallel-size", 2]
    arguments = ["--num-tokens", 64, "--encoded-tokens", 96, "--num-steps", 2, "--repeats", 1]
    finished = torchrun(2, "benchmarks/expert_parallel.py", *load, *arguments, "--output", output)
    summary = result_of(finished, output)["summary"]
    assert summary["EP 1"]["faster"] == summary["encoding, EP 1"]["faster"] == 1.0
    assert all(summary[name]["faster"] > 0 for name in ("EP", "EP, sliced", "encoding, EP"))
    assert summary["EP 1, experts sliced"]["tpot_ms"] > 0
    assert 1 / 2 <= summary["busiest"]["share"] <= 1  # of 3 experts, 2 or 3 are on one rank
    assert summary["same logits"]["difference"] < 1e-3


def test_a_link_of_no_speed_hides_nothing_when_it_blocks(checkpoints, tmp_path):
    output = tmp_path / "overlap.json"
    arguments = ["--num-tokens", 512, "--block-size", 64, "--gigabytes-per-second", 0.0005, "--repeats", 1]
    load = ["--load", checkpoints("llama")[1], "--output", output]
    summary = result_of(torchrun(2, "benchmarks/overlap.py", *load, *arguments), output)["summary"]
    for of in ("", "passed, "):
        blocking, overlapped = summary[f"{of}blocking"], summary[f"{of}overlapped"]
        assert blocking["waited_s"] >= blocking["on_the_link_s"] > 0
        assert overlapped["waited_s"] < blocking["waited_s"]


def test_every_aim_is_of_a_part_and_is_written_with_its_verdict(tmp_path, capsys):
    assert {aim.part for aim in AIMS} <= set(PARTS)
    hidden = {"overlapped": {"hidden": 0.79}, "passed, overlapped": {"hidden": 0.81}}
    results = {"overlap": hidden}
    write_figures(results, tmp_path / "figures.md")
    figures = (tmp_path / "figures.md").read_text()
    assert "| broadcast hidden at 1 GB/s | 0.8 | 0.790 | **missed** |" in figures


def test_pictures_are_drawn_of_what_has_run(tmp_path):
    variants = {"exact": {"to_broadcast": 2.0}, "star, broadcast": {"to_broadcast": 1.0}}
    memory = {
        "num_tokens": 4096,
        "num_ranks": 1,
        "most_tokens_in_a_wave": 2048,
        "kv_mb": 9,
        "activations_mb": 5,
    }
    draw({"encoding-8k": variants, "memory-4K-1": memory}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"encoding.png", "memory.png"}


def test_sampling_in_one_batch_is_compared_kind_by_kind_with_sampling_row_by_row():
    model = SimpleNamespace(synchronize=lambda: None)
    logits = sampling.text_like_logits(7, 2000, torch.device("cpu"))
    summary = sampling.summarise([sampling.measure(logits, model) for _ in range(2)])
    assert list(summary) == list(sampling.KINDS)
    assert all(min(figures.values()) > 0 for figures in summary.values())
