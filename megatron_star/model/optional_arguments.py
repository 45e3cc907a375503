"""Arguments that a description may lack, of Megatron's and ours: each by itself, and together."""

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_star.model.checked_values import LARGEST_SIZE, CheckedValues
from megatron_star.model.transformer_config import Check, check_own_arguments, one_per_layer


def _window(values: CheckedValues, name: str) -> None:
    """Megatron's way of saying W tokens, the last of which is the one that sees them; or no window."""
    window = values.any(name)
    is_pair = isinstance(window, list | tuple) and len(window) == 2 and all(type(x) is int for x in window)
    if not is_pair or not (tuple(window) == (-1, -1) or (0 <= window[0] < LARGEST_SIZE and window[1] == 0)):
        raise values.wrong(name, "[W - 1, 0], with a window of W tokens")


OPTIONAL: dict[str, Check] = {
    "activation_func_clamp_value": CheckedValues.number,
    "apply_layernorm_1p": CheckedValues.boolean,
    "attention_output_gate": CheckedValues.boolean,
    "glu_linear_offset": partial(CheckedValues.number, above=-float("inf")),
    "kv_lora_rank": CheckedValues.integer,
    "moe_apply_probs_on_input": CheckedValues.boolean,
    "moe_latent_size": CheckedValues.integer,
    "moe_router_enable_expert_bias": CheckedValues.boolean,
    "moe_router_group_topk": CheckedValues.integer,
    "moe_router_num_groups": CheckedValues.integer,
    "moe_router_score_function": partial(CheckedValues.one_of, allowed=("softmax", "sigmoid")),
    "moe_router_topk_scaling_factor": CheckedValues.number,
    "moe_shared_expert_gate": CheckedValues.boolean,
    "moe_shared_expert_intermediate_size": CheckedValues.integer,
    "multi_latent_attention": CheckedValues.boolean,
    "no_rope_freq": one_per_layer,
    "q_lora_rank": CheckedValues.integer,
    "qk_head_dim": CheckedValues.integer,
    "qk_l2_norm": CheckedValues.boolean,
    "qk_pos_emb_head_dim": CheckedValues.integer,
    "rotary_seq_len_interpolation_factor": CheckedValues.number,
    "softmax_scale": CheckedValues.number,
    "softmax_type": partial(CheckedValues.one_of, allowed=("vanilla", "off-by-one", "learnable")),
    "v_head_dim": CheckedValues.integer,
    "window_attn_skip_freq": one_per_layer,
    "window_size": _window,
}
"""Arguments of Megatron's that a description may lack, or have as None."""

_EXCLUDE_EACH_OTHER = (
    ("qk_l2_norm", "qk_layernorm"),
    ("activation", "swiglu"),
    ("add_mlp_bias", "num_experts"),
    ("qk_norm_of_rotated_only", "qk_layernorm_after_rotation"),
    *(
        ("multi_latent_attention", other)
        for other in (
            *("window_size", "chunked_layers", "attention_softcap", "attention_output_gate", "qk_l2_norm"),
            *("add_qkv_bias", "no_rope_freq", "query_scale_beta", "longrope_short_factors"),
            "qk_layernorm_after_rotation",
        )
    ),
)

LATENT_SIZES = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


def check_optional(values: CheckedValues, args: Mapping[str, Any]) -> None:
    """Those that `args` have. None says nothing.

    Raises:
        ValueError: one is not allowed, or not together with another.
    """
    for name, check in OPTIONAL.items():
        if args.get(name) is not None:
            check(values, name)
    check_own_arguments(values, args)
    for one, other in _EXCLUDE_EACH_OTHER:
        if args.get(one) and args.get(other):
            raise values.wrong(one, f"absent together with {other}")
    if args.get("parallel_mlp") and args.get("norm_placement", "before") != "before":
        raise values.wrong("norm_placement", "'before' together with parallel_mlp")
    if args.get("activation") == "xielu" and (args.get("gated_mlp") or args.get("num_experts")):
        raise values.wrong("activation", "another one of gated MLPs and of experts")
    _check_masks(values, args)
    _check_groups_of_experts(values, args)
    _check_latent_attention(values, args)
    _check_norms_of_queries_and_keys(values, args)


def _check_masks(values: CheckedValues, args: Mapping[str, Any]) -> None:
    if args.get("window_attn_skip_freq") and not args.get("window_size"):
        raise values.wrong("window_attn_skip_freq", "absent without window_size")
    if args.get("chunked_layers") and args.get("window_size"):
        windows = args.get("window_attn_skip_freq") or [1] * args["num_layers"]
        if any(map(operator.and_, windows, args["chunked_layers"])):
            raise values.wrong("chunked_layers", "0 for layers that have a window")


def _check_groups_of_experts(values: CheckedValues, args: Mapping[str, Any]) -> None:
    """The router first chooses groups of experts, then experts in them."""
    experts, groups = args.get("num_experts"), args.get("moe_router_num_groups")
    if not args.get("moe_router_group_topk"):
        return
    if not groups or not experts or experts % groups:
        raise values.wrong("moe_router_num_groups", f"a divisor of num_experts, {experts}")
    values.integer("moe_router_group_topk", most=groups)
    if args["moe_router_topk"] > args["moe_router_group_topk"] * (experts // groups):
        raise values.wrong("moe_router_topk", "at most the experts of moe_router_group_topk groups")


def _check_latent_attention(values: CheckedValues, args: Mapping[str, Any]) -> None:
    if not args.get("multi_latent_attention"):
        for name in (*LATENT_SIZES, "q_lora_rank"):
            if args.get(name) is not None:
                raise values.wrong(name, "absent without multi_latent_attention")
        return
    for name in LATENT_SIZES:
        values.integer(name)
    head_size = args["qk_head_dim"] + args["qk_pos_emb_head_dim"]
    values.one_of("kv_channels", (head_size,))
    values.one_of("num_query_groups", (args["num_attention_heads"],))
    values.one_of("group_query_attention", (False,))
    values.one_of("qk_layernorm", (True,))  # Megatron's word for the norms of the latents
    values.one_of("softmax_type", ("vanilla", None), None)
    values.one_of("normalization", ("RMSNorm",))
    values.one_of("position_embedding_type", ("rope", "yarn"))
    if args["qk_pos_emb_head_dim"] % 2:
        raise values.wrong("qk_pos_emb_head_dim", "even, to be rotated in pairs")


def _check_norms_of_queries_and_keys(values: CheckedValues, args: Mapping[str, Any]) -> None:
    over_all_heads = args.get("qk_layernorm_span") == "all_heads"
    after_rotation = bool(args.get("qk_layernorm_after_rotation"))
    if over_all_heads and after_rotation:
        raise values.wrong("qk_layernorm_after_rotation", "false together with qk_layernorm_span='all_heads'")
    if over_all_heads or after_rotation:
        values.one_of("normalization", ("RMSNorm",))
        if args.get("apply_layernorm_1p"):
            raise values.wrong("apply_layernorm_1p", "false with norms over all heads or after rotation")
