"""`inspect` says which kinds of layers a checkpoint has, and what each of them sends and keeps."""

import torch
from random_models import CONFIGS
from transformers import AutoModelForCausalLM

from checkpoints_tools.inspect import inspect
from checkpoints_tools.kinds_of_layers import kinds_of_layers, positions

GEMMA_LIKE = {
    "num_layers": 6,
    "num_query_groups": 4,
    "kv_channels": 256,
    "window_size": [1023, 0],
    "window_attn_skip_freq": [1, 1, 1, 1, 1, 0],
    "attention_softcap": 50.0,
    "softmax_scale": 0.0625,
    "position_embedding_type": "rope",
    "rotary_base": 1000000,
    "window_rotary_base": 10000.0,
    "rotary_seq_len_interpolation_factor": 8.0,
}
LLAMA_4_LIKE = {
    "num_layers": 4,
    "num_query_groups": 1,
    "kv_channels": 8,
    "attention_chunk_size": 8192,
    "chunked_layers": [1, 1, 1, 0],
    "no_rope_freq": [0, 0, 0, 1],
    "softmax_type": "off-by-one",
    "position_embedding_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "rotary_base": 500000,
    "rotary_percent": 0.5,
}


def test_each_kind_of_layer_has_a_line_with_what_crosses_ranks_and_is_kept():
    lines = kinds_of_layers(GEMMA_LIKE, bytes_per_value=2)
    assert [*lines] == ["5 x window 1024", "1 x full", "softmax"]
    assert lines["5 x window 1024"] == (
        "exact; the KV of 1,023 tokens before a segment crosses ranks; "
        "KV: 20,480 bytes per token, of at most the last 1,023"
    )
    assert "anchor" in lines["1 x full"] and lines["1 x full"].endswith("KV: 4,096 bytes per token, of all")
    assert lines["softmax"] == "scores capped at 50, scale 0.0625"


def test_chunks_and_sinks_are_named():
    lines = kinds_of_layers(LLAMA_4_LIKE, bytes_per_value=4)
    assert [*lines] == ["3 x chunk 8192", "1 x full", "softmax"]
    assert "its chunk's tokens before a segment" in lines["3 x chunk 8192"]
    assert lines["softmax"] == "a sink of 0 for each head"


def test_layers_know_positions_in_ways_that_are_named():
    assert positions(GEMMA_LIKE) == ("rotary, base 1,000,000, linear scaling by 8, base 10,000 in windows")
    assert positions(LLAMA_4_LIKE) == (
        "rotary, base 500,000, YaRN scaling by 4, of 50% of a head, none in 1 of 4 layers"
    )
    phi = {
        "position_embedding_type": "longrope",
        "rotary_base": 10000,
        "longrope_original_max_position_embeddings": 4096,
        "num_layers": 3,
        "query_scale_beta": 0.1,
        "query_scale_floor": 8192,
    }
    assert positions(phi) == (
        "rotary, base 10,000, longrope beyond 4,096 tokens, queries of 3 layers scaled from position 8,192"
    )


def test_a_checkpoint_with_windows_and_sinks_says_the_same_in_both_formats(converted):
    """Three layers with two KV heads of 16 in float32, of which two have a window of 13."""
    made = converted("gpt_oss")
    report = inspect(made.megatron)
    assert report == inspect(made.hf)
    assert "\n2 x window 13             exact; the KV of 12 tokens before a segment" in report
    assert "\nsoftmax                   a learned sink for each head\n" in report
    assert (
        "\nKV cache                  256 bytes per token (80 with --kv-dtype int8 or fp8), "
        f"and at most {2 * 12 * 256:,} more in all\n" in report
    )


def test_a_checkpoint_of_full_layers_has_one_kind(converted):
    report = inspect(converted("llama_tied").megatron)
    assert "\n3 x full  " in report
    assert "\nKV cache                  768 bytes per token (240 with --kv-dtype int8 or fp8)\n" in report
    assert "softmax" not in report


def test_a_checkpoint_of_experts_says_how_many_parameters_a_token_uses(converted):
    """Of each layer's experts the chosen ones; of embedding and output layer the latter."""
    made = converted("qwen3_moe")
    report = inspect(made.megatron)
    assert report == inspect(made.hf)
    config = CONFIGS["qwen3_moe"]
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_layers, num_experts = config.num_hidden_layers, config.num_experts
    unused = num_layers * (num_experts - config.num_experts_per_tok) * expert
    active = model.num_parameters() - unused - config.vocab_size * config.hidden_size
    assert f"\nparameters                {model.num_parameters():,}\n" in report
    assert f"\nactive parameters         {active:,} per token\n" in report
    num_bytes = num_layers * num_experts * expert * 4
    assert f"\nexperts                   {num_bytes / 1e9:.3f} GB, over expert-parallel" in report
    assert "active" not in inspect(converted("llama_tied").megatron)


def test_a_checkpoint_of_latent_attention_says_what_a_token_keeps(converted):
    """A latent and a rotated key for all heads, in float32."""
    made, config = converted("deepseek_v3"), CONFIGS["deepseek_v3"]
    report = inspect(made.megatron)
    values = config.kv_lora_rank + config.qk_rope_head_dim
    num_bytes = config.num_hidden_layers * values * 4
    assert f"\nKV cache                  {num_bytes:,} bytes per token\n" in report
    assert f"(values), of a latent of {config.kv_lora_rank}\n" in report
    assert f"in {config.num_hidden_layers - config.first_k_dense_replace} of" in report
    assert report == inspect(made.hf)
