"""Small random Hugging Face models, and the dense forward of one with a plan's mask."""

from pathlib import Path

import torch
from reference import star_mask, with_query
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from megatron_star.config import StarConfig

VOCAB_SIZE = 257
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _heads(num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
    }


MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, **_heads(9, 3, 16)),
    "llama_tied": LlamaConfig(**_COMMON, **_heads(6, 2, 8), tie_word_embeddings=True),
    "llama_one_kv_head": LlamaConfig(**_COMMON, **_heads(4, 1, 16)),
    "qwen2": Qwen2Config(**_COMMON, **{k: v for k, v in _heads(6, 2, 8).items() if k != "head_dim"}),
    "qwen2_yarn": Qwen2Config(
        **_COMMON,
        **{k: v for k, v in _heads(6, 2, 8).items() if k != "head_dim"},
        rope_parameters=YARN,
    ),
    "qwen3": Qwen3Config(**_COMMON, **_heads(6, 2, 16)),
}


def dense_logits(hf: Path, token_ids: list[int], num_context: int, config: StarConfig) -> Tensor:
    """[tokens, vocabulary], float32: one dense forward of the Hugging Face model with the plan's mask."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    mask = additive_mask(num_context, len(token_ids), config)
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), attention_mask=mask).logits[0]


def additive_mask(num_context: int, num_tokens: int, config: StarConfig) -> Tensor:
    """[1, 1, tokens, tokens]: of a plan for the context, and of tokens that see all before them."""
    block_size = max(1, num_context) if config.mode == "exact" else config.block_size
    context = star_mask(num_context, block_size, config.anchor_size, config.neighbor_blocks)
    visible = with_query(context, num_tokens - num_context)
    additive = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    return additive[None, None]


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Token ids of the small models' vocabulary."""
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
