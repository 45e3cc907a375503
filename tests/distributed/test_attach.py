"""A model that somebody else built: attached it answers as Megatron does, or is refused by name."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from attach_ranks import VOCAB_SIZE, logits_of_both, refusals, refused_modules
from distributed import run_ranks
from models import random_tokens

from megatron_star.model.supported import REFUSED

REPOSITORY = Path(__file__).parents[2]
TOKENS = [token % VOCAB_SIZE for token in random_tokens(41)]

VALUES = {
    "context_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
    "experimental_attention_variant": "dsa",
    "linear_attention_freq": 4,
    "apply_query_key_layer_scaling": True,
    "fused_single_qkv_rope": True,
    "use_kitchen": True,
    "use_kitchen_attention": True,
    "heterogeneous_block_specs": True,
    "is_hybrid_model": True,
    "mtp_num_layers": 1,
    "flash_decode": True,
    "cuda_graph_impl": "local",
    "inference_fuse_tp_communication": True,
    "use_inference_optimized_layers": True,
    "batch_invariant_mode": True,
    "moe_shared_expert_overlap": True,
    "fp8": "hybrid",
    "fp4": "e2m1",
    "quant_recipe": "any",
    "moe_expert_capacity_factor": 1.0,
    "moe_expert_rank_capacity_factor": 1.0,
    "moe_input_jitter_eps": 0.1,
    "moe_router_force_load_balancing": True,
    "moe_router_force_biased": 0.5,
}


OWN_VALUES = {
    "norm_placement": "both",
    "residual_multiplier": 0.3,
    "norm_bias": False,
    "parallel_mlp": True,
    "qk_layernorm_span": "all_heads",
    "qk_layernorm_after_rotation": True,
    "add_proj_bias": True,
    "add_mlp_bias": True,
}


@cache
def said() -> dict[str, str]:
    (own,) = run_ranks(1, refusals, OWN_VALUES, {"add_bias_linear": False})
    return own | run_ranks(1, refusals, VALUES)[0] | run_ranks(1, refused_modules)[0]


def test_every_refused_field_has_a_value_here_and_a_model_without_them_is_accepted():
    assert set(VALUES) == set(REFUSED)
    assert said()["as it is"] == "accepted"


@pytest.mark.parametrize("field", VALUES)
def test_a_setting_that_cannot_be_run_is_refused_by_its_name(field):
    assert said()[field] == f"Star Attention does not support {field}={VALUES[field]!r}"


@pytest.mark.parametrize("field", OWN_VALUES)
def test_a_model_without_the_modules_that_our_field_asks_for_is_refused_by_its_name(field):
    assert re.match(f"Star Attention does not support {field}=.* without our modules", said()[field])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another router", "moe_router_normalised=True without our modules"),
        ("no swap", "the self-attention of layer 1 is SelfAttention.*megatron_star.with_star_attention"),
        ("cross-attention", r"cross-attention \(Identity\)"),
        ("core attention", "a core attention of Capped"),
        ("first stage", "a stage of a pipeline"),
        ("last stage", "a stage of a pipeline"),
        ("mrope", "position_embedding_type='mrope'"),
        ("no GPTModel", "runs Megatron's GPTModel, not Linear"),
    ],
)
def test_a_model_whose_modules_cannot_be_run_is_refused_by_their_name(what, words):
    assert re.search(words, said()[what]), said()[what]


# Megatron's local attention wants values of `kv_channels`.
LATENT = {
    "kv_lora_rank": 20,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 10,
    "kv_channels": 10,
    "qk_layernorm": True,
    "transformer_impl": "local",
    "original_max_position_embeddings": 16,
    "add_bias_linear": False,
}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"num_query_groups": 2, "attention_output_gate": True}, {}),
        ({"no_rope_freq": [0, 1]}, {}),
        ({"qk_l2_norm": True}, {}),
        ({"qk_layernorm": True, "layernorm_epsilon": 1e-3}, {}),
        ({"softmax_scale": 0.7}, {}),
        ({"softmax_type": "learnable", "num_query_groups": 2}, {}),
        ({"softmax_type": "off-by-one"}, {}),
        ({"window_size": (6, 0), "window_attn_skip_freq": 2}, {}),
        ({"window_size": (6, 0)}, {}),
        ({"window_size": (6, 0), "window_attn_skip_freq": [0, 1], "softmax_type": "learnable"}, {}),
        ({"softmax_type": "off-by-one", "no_rope_freq": [1, 0], "attention_output_gate": True}, {}),
        ({"use_mup": True, "mup_base_hidden_size": 16, "mup_embedding_mult": 3.0}, {}),
        ({"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}, {}),
        ({"gated_linear_unit": True, "activation_func_clamp_value": 0.5, "glu_linear_offset": 1.0}, {}),
        ({"rotary_interleaved": True}, {"rotary_percent": 0.5}),
        ({}, {"position_embedding_type": "learned_absolute"}),
        ({}, {"position_embedding_type": "none"}),
        ({}, {"share_embeddings_and_output_weights": True, "rope_scaling": True}),
        (LATENT | {"q_lora_rank": 24, "rope_type": "rope"}, {}),
        (LATENT | {"q_lora_rank": 24, "mscale": 0.7, "mscale_all_dim": 1.9}, {}),
        (LATENT | {"q_lora_rank": None, "qk_layernorm": False}, {}),
        ({"num_moe_experts": 4, "moe_router_topk": 2, "add_bias_linear": False}, {}),
    ],
    ids=lambda value: ", ".join(value) or "plain",
)
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "with speed"])
def test_an_attached_model_answers_as_megatrons_own_forward_pass(config, options, fast):
    ((ours, theirs),) = run_ranks(1, logits_of_both, config, options, TOKENS, 30, fast)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


WITHOUT_SPEED = """
import sys
sys.path[:0] = {paths}
sys.modules["megatron_star.speed"] = None  # any import of it fails, in the ranks too, which run these lines
import multiprocessing
import distributed
import torch
from attach_ranks import logits_of_both
sys.modules["rank_imports"] = sys  # which import it, and so would ranks that are forked
distributed._process_context = lambda: multiprocessing.get_context("spawn")
if __name__ == "__main__":
    torch.save(distributed.run_ranks(2, logits_of_both, {{}}, {{}}, {tokens}, 30, {fast}), "logits.pt")
"""


def run_without_speed(directory: Path, fast: bool) -> subprocess.CompletedProcess:
    """`logits_of_both` on two ranks that have no folder `speed/`."""
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests/distributed")]
    program = directory / "program.py"
    program.write_text(WITHOUT_SPEED.format(paths=paths, tokens=TOKENS, fast=fast))
    return subprocess.run([sys.executable, program], cwd=directory, capture_output=True, text=True)


def test_without_the_folder_speed_answers_are_the_same(tmp_path):
    done = run_without_speed(tmp_path, fast=False)
    assert done.returncode == 0, done.stderr
    with_speed = run_ranks(2, logits_of_both, {}, {}, TOKENS, 30, True)
    for (slow, _), (fast, _) in zip(torch.load(tmp_path / "logits.pt"), with_speed, strict=True):
        torch.testing.assert_close(slow, fast, atol=1e-4, rtol=0)
        assert torch.equal(slow.argmax(-1), fast.argmax(-1))


def test_the_folder_is_really_not_there(tmp_path):
    assert "megatron_star.speed" in run_without_speed(tmp_path, fast=True).stderr


def test_the_readmes_lines_for_your_own_model_run(tmp_path):
    text = (REPOSITORY / "README.md").read_text()
    section = text.split("## Your own Megatron model\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "own.py").write_text(block)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "own.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    tokens = done.stdout.split()
    assert len(tokens) == 8 and all(0 <= int(token) < 256 for token in tokens)
