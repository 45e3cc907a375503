"""Models that can be planned for by name, in Megatron's argument names: sizes alone, as their makers publish
them, so that no download is needed."""

from collections.abc import Mapping
from typing import Any

KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    # https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json
    "deepseek-v3": {
        "num_layers": 61,
        "hidden_size": 7168,
        "ffn_hidden_size": 18432,
        "num_attention_heads": 128,
        "num_query_groups": 128,
        "kv_channels": 192,
        "swiglu": True,
        "vocab_size": 129280,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": 163840,
        "num_experts": 256,
        "moe_layer_freq": [0] * 3 + [1] * 58,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": 2048,
        "moe_shared_expert_intermediate_size": 2048,
        "multi_latent_attention": True,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_head_dim": 128,
        "qk_pos_emb_head_dim": 64,
        "v_head_dim": 128,
    },
    # https://huggingface.co/Qwen/Qwen3-235B-A22B/blob/main/config.json
    "qwen3-235b-a22b": {
        "num_layers": 94,
        "hidden_size": 4096,
        "ffn_hidden_size": 12288,
        "num_attention_heads": 64,
        "num_query_groups": 4,
        "kv_channels": 128,
        "swiglu": True,
        "vocab_size": 151936,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": 40960,
        "num_experts": 128,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": 1536,
    },
}
