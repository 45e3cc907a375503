"""Small models with latent attention: transformers' own, the same weights in Megatron's names, and one dense
forward of theirs with the mask that a configuration implies.

Passed keys are named by the stored key: its latent after the norm, and its rotated part. Both are taken from
the model itself as it runs.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from latent_ranks import Weights
from models import VOCAB_SIZE
from passed_keys_ranks import NUM_GENERATED, Case
from reference import PassingBlocks, star_mask, with_query
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

_NAME = "with_a_mask_of_latents"
_NUM_LAYERS, _NUM_HEADS = 3, 6
_KV_RANK, _PLAIN, _ROTATED, _VALUE = 20, 12, 8, 10
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,
    "intermediate_size": 84,
    "num_hidden_layers": _NUM_LAYERS,
    "first_k_dense_replace": _NUM_LAYERS,  # no experts
    "num_attention_heads": _NUM_HEADS,
    "num_key_value_heads": _NUM_HEADS,
    "kv_lora_rank": _KV_RANK,
    "qk_nope_head_dim": _PLAIN,
    "qk_rope_head_dim": _ROTATED,
    "v_head_dim": _VALUE,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ROPE = {"rope_type": "default", "rope_theta": 1000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.9,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "rope": DeepseekV3Config(**_SIZES, q_lora_rank=24, rope_parameters=_ROPE),
    "yarn": DeepseekV3Config(**_SIZES, q_lora_rank=24, rope_parameters=_YARN),
    "rotated in halves": DeepseekV3Config(
        **_SIZES, q_lora_rank=24, rope_interleave=False, rope_parameters=_ROPE
    ),
    "yarn, queries of full rank": DeepseekV2Config(**_SIZES, q_lora_rank=None, rope_parameters=_YARN),
}


@cache
def hugging_face_model(name: str) -> PreTrainedModel:
    """Of this name in CONFIGS, with random norms; in float32."""
    AttentionInterface.register(_NAME, lambda *args, **options: None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], dtype=torch.float32, attn_implementation=_NAME
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.requires_grad_(False)


def megatron_arguments(name: str) -> dict[str, Any]:
    """The model's, in Megatron's names."""
    config = CONFIGS[name]
    rope = config.rope_parameters
    args = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_attention_heads,
        "group_query_attention": False,
        "kv_channels": _PLAIN + _ROTATED,
        "multi_latent_attention": True,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": _KV_RANK,
        "qk_head_dim": _PLAIN,
        "qk_pos_emb_head_dim": _ROTATED,
        "v_head_dim": _VALUE,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "padded_vocab_size": VOCAB_SIZE + 1,
        "max_position_embeddings": config.max_position_embeddings,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_interleaved": getattr(config, "rope_interleave", True),
    }
    if rope["rope_type"] == "default":
        return args
    return args | {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope["beta_fast"],
        "yarn_beta_slow": rope["beta_slow"],
        "yarn_correction_range_round_to_int": True,
        "mscale": rope["mscale"],
        "mscale_all_dim": rope["mscale_all_dim"],
    }


_ATTENTION = {
    "q_proj": "linear_q_proj",
    "q_a_proj": "linear_q_down_proj",
    "q_a_layernorm": "q_layernorm",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_a_layernorm": "kv_layernorm",
    "kv_b_proj": "linear_kv_up_proj",
    "o_proj": "linear_proj",
}


@cache
def megatron_weights(name: str) -> Weights:
    """The model's, in Megatron's names and whole; a row more of the vocabulary."""
    theirs = hugging_face_model(name).state_dict()
    padding = torch.zeros(1, CONFIGS[name].hidden_size)
    ours = {
        "embedding.word_embeddings.weight": torch.cat((theirs["model.embed_tokens.weight"], padding)),
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": torch.cat((theirs["lm_head.weight"], padding)),
    }
    for layer in range(_NUM_LAYERS):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        gate, up = (theirs[f"{old}mlp.{part}_proj.weight"] for part in ("gate", "up"))
        ours |= {
            f"{new}input_layernorm.weight": theirs[f"{old}input_layernorm.weight"],
            f"{new}pre_mlp_layernorm.weight": theirs[f"{old}post_attention_layernorm.weight"],
            f"{new}mlp.linear_fc1.weight": torch.cat((gate, up)),
            f"{new}mlp.linear_fc2.weight": theirs[f"{old}mlp.down_proj.weight"],
        }
        for theirs_of, ours_of in _ATTENTION.items():
            if (weight := theirs.get(f"{old}self_attn.{theirs_of}.weight")) is not None:
                ours[f"{new}self_attention.{ours_of}.weight"] = weight
    return ours


def dense_logits(
    name: str, token_ids: list[int], see: Callable[[Tensor], Tensor], num_context: int
) -> Tensor:
    """[tokens, vocabulary].

    Args:
        see: given a layer's stored keys [num_context, l + r], the mask [num_context, num_context], bool.
    """
    model, latents = hugging_face_model(name), {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, arguments, out: latents.__setitem__(layer, out[0])

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **options: Any) -> Any:
        stored = torch.cat((latents[module.layer_idx], key[0, 0, :, _PLAIN:]), -1)[:num_context]
        visible = with_query(see(stored), len(token_ids) - num_context)
        additive = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, additive[None, None], **options)

    AttentionInterface.register(_NAME, attend)
    hooks = [
        layer.self_attn.kv_a_layernorm.register_forward_hook(keep(number))
        for number, layer in enumerate(model.model.layers)
    ]
    try:
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def logits_of_case(name: str, token_ids: list[int], case: Case) -> Tensor:
    """[1 + NUM_GENERATED, vocabulary]: after the query, and after each token behind it."""
    num_context, star = case.turns[-1], case.star

    def see(stored: Tensor) -> Tensor:
        if star.mode == "exact":
            return star_mask(num_context, num_context)
        blocks = PassingBlocks.of(case.turns, star)
        return blocks.mask(blocks.name(stored)) if star.passed_keys else plain

    plain = None
    if star.mode != "exact" and not star.passed_keys:
        plain = star_mask(num_context, star.block_size, star.anchor_size, star.neighbor_blocks)
    end = num_context + case.query
    return dense_logits(name, token_ids[: end + NUM_GENERATED], see, num_context)[end - 1 :]
