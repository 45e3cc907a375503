"""From Megatron's argument names to a Megatron model configuration.

`args` is a mapping with the names of Megatron-LM's command line (`num_layers`, `norm_epsilon`, ...), as a
converted checkpoint carries them. It is the only description of a model that this project stores.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from megatron_star.model.supported import check_supported
from megatron_star.model.transformer_config import OWN_FIELDS, StarMLATransformerConfig, StarTransformerConfig

_SAME_NAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "window_attn_skip_freq",
    "softmax_type",
    "softmax_scale",
    "no_rope_freq",
    "rotary_interleaved",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_load_balancing_type",
    "moe_token_dispatcher_type",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_latent_size",
    "moe_apply_probs_on_input",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "activation_func_clamp_value",
    "glu_linear_offset",
    *OWN_FIELDS,
)
_RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_LATENT_YARN = {
    "rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_original_max_position_embeddings": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_DIVIDED_OVER_TP = (
    *("num_attention_heads", "ffn_hidden_size", "moe_shared_expert_intermediate_size", "padded_vocab_size"),
)
_YARN = {
    "rotary_scaling_factor": "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "yarn_beta_fast": "yarn_beta_fast",
    "yarn_beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
    "yarn_correction_range_round_to_int": "yarn_correction_range_round_to_int",
}


class ModelParallelSizes(NamedTuple):
    """Over how many ranks a model's weights are cut: all but experts, the experts of a layer, each expert."""

    tp: int = 1
    ep: int = 1
    expert_tp: int = 1


def transformer_config(
    args: Mapping[str, Any], sizes: ModelParallelSizes, *, dtype: torch.dtype, device: torch.device
) -> StarTransformerConfig:
    """Megatron's configuration of the model that `args` describe, for inference over so many ranks.

    Context parallelism is off in it: Megatron would cut rotary embeddings and assert in its attention.

    Raises:
        ValueError: heads, KV heads, experts or another size do not divide over the ranks.
        KeyError: an argument that every model has is missing from `args`.
    """
    _check_divisible(args, sizes)
    values = {name: args[name] for name in _SAME_NAME if args.get(name) is not None}
    values |= {field: args[name] for name, field in _RENAMED.items() if args.get(name) is not None}
    values["num_query_groups"] = args["num_query_groups"] if args.get("group_query_attention") else None
    if (window := args.get("window_size")) and tuple(window) != (-1, -1):
        values["window_size"] = tuple(window)
    if args.get("swiglu"):
        values |= {"activation_func": F.silu, "gated_linear_unit": True}
    if args.get("num_experts"):
        # Megatron has biases of experts only where each is whole on its rank; ours, see `grouped_experts.py`.
        values |= {"expert_tensor_parallel_size": 1, "moe_router_dtype": "fp32"}
        if isinstance(args.get("moe_layer_freq"), list):
            values["moe_layer_freq"] = args["moe_layer_freq"]
    make_config = StarTransformerConfig
    if args.get("multi_latent_attention"):
        make_config = StarMLATransformerConfig
        values |= _latent_values(args)
    config = make_config(
        **values,
        tensor_model_parallel_size=sizes.tp,
        expert_model_parallel_size=sizes.ep,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    config.expert_tensor_parallel_size = sizes.expert_tp
    if args["position_embedding_type"] == "yarn":
        # GPTModel reads these as plain attributes of the configuration; it declares no fields for them.
        for name, attribute in _YARN.items():
            setattr(config, attribute, args[name])
    check_supported(config)
    return config


def gpt_model_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of Megatron's GPTModel that are not part of `TransformerConfig`."""
    return {
        "vocab_size": args["padded_vocab_size"],
        "max_sequence_length": args["max_position_embeddings"],
        "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
        # GPTModel knows no longrope; `rotary_frequencies.py` makes what the model rotates with.
        "position_embedding_type": args["position_embedding_type"].replace("longrope", "rope"),
        "rotary_percent": args.get("rotary_percent", 1.0),
        "rotary_base": args.get("rotary_base", 10000),
        "seq_len_interpolation_factor": args.get("rotary_seq_len_interpolation_factor"),
        "rope_scaling": bool(args.get("use_rope_scaling")),
        "rope_scaling_factor": args.get("rope_scaling_factor") or 8.0,
    }


def _latent_values(args: Mapping[str, Any]) -> dict[str, Any]:
    """Of `MLATransformerConfig`, whose defaults are DeepSeek's."""
    is_yarn = args["position_embedding_type"] == "yarn"
    values = {name: args.get(name) for name in _LATENT}
    values |= {"rope_type": "yarn" if is_yarn else "rope", "rotary_base": args["rotary_base"]}
    scaling = {field: args[name] for name, field in _LATENT_YARN.items() if args.get(name) is not None}
    return values | {"rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0} | scaling


def _check_divisible(args: Mapping[str, Any], sizes: ModelParallelSizes) -> None:
    tp_size = sizes.tp
    heads = args["num_attention_heads"]
    groups = args["num_query_groups"] if args.get("group_query_attention") else heads
    for name in _DIVIDED_OVER_TP:
        if (args.get(name) or 0) % tp_size:
            raise ValueError(f"{name} {args[name]} cannot be divided over tensor-parallel size {tp_size}")
    experts = (("num_experts", "expert-parallel", sizes.ep),)
    experts += (("moe_ffn_hidden_size", "expert-tensor-parallel", sizes.expert_tp),)
    for name, kind, size in experts if args.get("num_experts") else ():
        if args[name] % size:
            raise ValueError(f"{name} {args[name]} cannot be divided over {kind} size {size}")
    if sizes.ep > 1 and not args.get("num_experts"):
        raise ValueError(f"expert-parallel size {sizes.ep}: the model has no experts")
    if groups % tp_size and tp_size % groups:
        raise ValueError(
            f"{groups} KV heads (num_query_groups) and tensor-parallel size {tp_size}: "
            "one must be a multiple of the other"
        )
