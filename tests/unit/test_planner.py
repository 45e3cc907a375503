"""The planner's figures agree with arithmetic written out, and its refusals say what would fit."""

import json
import random
from dataclasses import replace

import pytest
from mutations import with_a_wrong_value

from megatron_star.planning.estimates import Workload, default_block_size, estimate, estimates, tp_sizes
from megatron_star.planning.hardware import GPUS, Cluster
from megatron_star.programs import plan_cluster as plan
from megatron_star.programs.plan_cluster import main, model_size, parse_arguments, read_model, run

K, M = 1 << 10, 1 << 20
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "8B": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
    },
    "70B": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
    },
}
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@pytest.fixture
def write_config(tmp_path):
    """Writes a config.json and returns its path."""

    def write(**values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path / "config.json"

    return write


def workload(path, num_context_tokens, **options):
    """With the default block size."""
    sizes = {"block_size": default_block_size(num_context_tokens), "wave_tokens": 32 * K} | options
    return Workload(model_size(read_model(path)), num_context_tokens, 256, **sizes)


def h100s(num_gpus):
    """In nodes of eight."""
    return Cluster(GPUS["h100"], num_gpus, 8)


@pytest.mark.parametrize("num_gpus", [8, 16, 32])
@pytest.mark.parametrize("num_tokens", [128 * K, M])
@pytest.mark.parametrize("name", ["8B", "70B"])
def test_llama_at_tp_8_takes_the_time_of_arithmetic_written_out(write_config, name, num_tokens, num_gpus):
    """Blocks of 32K, as many a wave as CP ranks; one anchor of 32K; bfloat16; every broadcast is hidden."""
    layers, hidden, ffn = (
        CONFIGS[name][k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    cp, b, tp = num_gpus // 8, 32 * K, 8
    weights = layers * hidden * (2 * hidden + 2 * 1024 + 3 * ffn)  # all queries, 8 KV heads of 128, the MLP
    linear_s = 2 * weights / tp / (0.7 * 989e12)
    pair_s = 4 * layers * hidden / tp / (0.5 * 989e12)
    all_reduce_s = 2 * layers * (2 * 7 / 8) * hidden * 2 / (0.8 * 450e9)
    waves = num_tokens // b // cp
    without_anchor = 1 if cp == 1 else 0  # alone in its wave, the first block is quick
    # The first block sees no anchor: its wave is shared where whole blocks would cost 10% more.
    shared_pairs = b**2 * (1.5 * cp - 1) / cp
    flops = [2 * weights * b + 4 * layers * hidden * pairs for pairs in (1.5 * b**2, shared_pairs)]
    first_pairs = shared_pairs if cp == 1 or flops[0] > 1.1 * flops[1] else 1.5 * b**2
    kv_bytes = num_tokens / cp * layers * 2 * 128 * 2
    step_s = ((weights + 128256 * hidden) * 2 / tp + kv_bytes) / (0.8 * 3.35e12) + 2 * layers * 10e-6
    step_s += layers * 25e-6 if cp > 1 else 0.0

    found = estimate(workload(write_config(**LLAMA, **CONFIGS[name]), num_tokens), h100s(num_gpus), tp)

    token_s = linear_s + all_reduce_s
    expected = {
        "exact": token_s * num_tokens / cp + pair_s * num_tokens**2 / 2 / cp,
        "recompute": token_s * b * (2 * waves - without_anchor)
        + pair_s * b**2 * (2 * waves - 1.5 * without_anchor),
        "broadcast": token_s * b * waves + pair_s * (1.5 * b**2 * (waves - 1) + first_pairs),
    }
    for mode, seconds in expected.items():
        assert found.ttft_s[mode] == pytest.approx(seconds + step_s, rel=0.03), mode
    assert found.tpot_s == pytest.approx(step_s, rel=0.03)
    assert found.weights_bytes == pytest.approx((weights + 2 * 128256 * hidden) * 2 / tp)
    assert found.kv_bytes == pytest.approx(kv_bytes, rel=0.01)


def test_a_slow_network_shows_what_attention_does_not_hide(write_config):
    """The anchor's KV of 70B at TP 8, 40 KiB a token, less what the blocks' own attention hides."""
    asked = workload(write_config(**LLAMA, **CONFIGS["70B"]), 128 * K)
    fast, slow = h100s(32), Cluster(replace(GPUS["h100"], network_link_bytes_per_s=0.1e9), 32, 8)
    gained = estimate(asked, slow, 8).ttft_s["broadcast"] - estimate(asked, fast, 8).ttft_s["broadcast"]
    anchor_s = 32 * K * 40 * K / 0.1e9
    hidden_s = 4 * 80 * 8192 / 8 / (0.5 * 989e12) * (32 * K) ** 2 / 2
    assert gained == pytest.approx(anchor_s - hidden_s, rel=0.01)
    assert estimate(asked, slow, 8).ttft_s["recompute"] < estimate(asked, slow, 8).ttft_s["broadcast"]


def test_the_ranking_is_that_of_the_benchmark_on_two_cores(write_config):
    """benchmarks/context_encoding.py --num-tokens 4K --block-size 512: 9.9, 12.5, 20.4 s (docs/slurm.md)."""
    asked = workload(write_config(**SMOLLM2), 4 * K, block_size=512, bytes_per_value=4)
    times = estimate(asked, Cluster(GPUS["cpu-core"], 2, 2), 1).ttft_s
    assert sorted(times, key=times.get) == ["broadcast", "exact", "recompute"]


def test_tp_stays_inside_a_node_and_divides_the_heads(write_config):
    assert tp_sizes(model_size(read_model(write_config(**LLAMA, **CONFIGS["8B"]))), h100s(32)) == [1, 2, 4, 8]
    assert tp_sizes(model_size(read_model(write_config(**SMOLLM2))), h100s(32)) == [1]


def test_a_thousand_gpus_and_a_million_tokens_are_planned(write_config):
    asked = workload(write_config(**LLAMA, **CONFIGS["70B"]), M)
    (found,) = estimates(asked, h100s(1024))
    assert (found.tp_size, found.cp_size) == (8, 128)
    assert found.fits["broadcast"]


def test_experts_count_once_in_memory_and_by_use_in_time(write_config):
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    mixtral = LLAMA | {"model_type": "mixtral", "vocab_size": 32000} | CONFIGS["8B"] | experts
    size = model_size(read_model(write_config(**mixtral)))
    assert size.num_parameters == pytest.approx(46.7e9, rel=0.01)
    assert size.num_parameters_per_token == pytest.approx(12.7e9, rel=0.01)


@pytest.mark.parametrize(
    ("model", "context", "gpus", "line"),
    [
        (
            "70B",
            "128K",
            "1",
            "131,072 tokens do not fit 1 x h100: .* needs 199 GB and has 72; 4 x h100 would",
        ),
        ("8B", "4M", "1", "needs 573 GB and has 72; 16 x h100 would"),
        ("8B", "384K", "1", "--wave-tokens 16384 would"),
        ("8B", "128K", "12", "12 GPUs do not fill nodes of 8"),
        ("8B", "128K", "2048", "--gpus is 2048: it must be from 1 to 1024"),
        ("8B", "0", "8", "--context is 0"),
        ("8B", "32M", "8", "--context is 33554432: it must be from 1 to 16777216"),
        ("8B", "1M --block-size 0", "8", "--block-size is 0: it must be from 256 to"),
        (
            "8B",
            "16M --block-size 1",
            "8",
            "--block-size is 1: it must be from 4096 to .* 16,777,216 tokens",
        ),
        ("8B", "16M --wave-tokens 1", "8", "--wave-tokens is 1: it must be from 32768 to"),
        ("8B", "1K --num-tokens-to-generate -5", "8", "'-5' is not a whole number of at least 1"),
        ("8B", "1K --node-link nan", "8", "'nan' is not a number of at least 0.001"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(write_config, model, context, gpus, line):
    path = write_config(**LLAMA, **CONFIGS[model])
    with pytest.raises(ValueError, match=line):
        run(parse_arguments(["--model", str(path), "--context", *context.split(), "--gpus", gpus]))


def test_scripts_get_json_and_people_a_table(write_config, capsys):
    command = ["--model", str(write_config(**LLAMA, **CONFIGS["8B"])), "--context", "128K", "--gpus", "16"]
    run(parse_arguments(command))
    assert "TP=8 CP=2 BLOCK_SIZE=32768 sbatch --nodes=2" in capsys.readouterr().out
    run(parse_arguments([*command, "--json"]))
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [plan["tp_size"] * plan["cp_size"] for plan in plans] == [16] * 4
    assert plans[0]["fits"] == {"exact": True, "recompute": True, "broadcast": True}


def test_a_missing_model_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["plan", "--model", str(tmp_path / "no"), "--context", "1K", "--gpus", "1"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no'}: no such directory\n"


def test_a_thousand_wrong_models_are_estimated_or_refused_by_name(write_config, tmp_path, monkeypatch):
    right = read_model(write_config(**LLAMA, **CONFIGS["8B"]))
    generator, refused = random.Random(0), 0
    for _ in range(1000):
        wrong = with_a_wrong_value(dict(right), generator)
        monkeypatch.setattr(plan, "_unchecked_arguments", lambda path, wrong=wrong: wrong)
        try:
            estimates(workload(tmp_path, 1 * K), h100s(1))
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{tmp_path}: ")
    assert refused > 300
