"""What a checkpoint records about its model: checked where we model it, else allowed only without effect.

Names are those of Megatron-LM's command line and of Megatron-Core's `TransformerConfig`. A name that changes
results, but no tensor's shape, would otherwise be lost without a word.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues
from megatron_star.model.optional_arguments import OPTIONAL, check_optional
from megatron_star.model.rotary_frequencies import ROTARY_TYPES, rotary_size
from megatron_star.model.transformer_config import OWN_FIELDS

MOST_LAYERS = 10_000
_SIZES = (
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "padded_vocab_size",
    "max_position_embeddings",
)
_SWITCHES = (
    "group_query_attention",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "rotary_interleaved",
    "use_rope_scaling",
)
_NUMBERS = ("norm_epsilon", "rotary_base", "rotary_percent")
_YARN_NUMBERS = (
    "rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
)
_YARN_SWITCH, _EXPERTS_SWITCH = "yarn_correction_range_round_to_int", "moe_router_pre_softmax"
_SCALES = ("mscale", "mscale_all_dim")
_ROUTING_TYPE = "moe_router_load_balancing_type"
_ROUTING_TYPES = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")  # which differ in training only
MODELLED = frozenset(
    (
        *(*OPTIONAL, *OWN_FIELDS),
        *("num_layers", *_SIZES, *_SWITCHES, *_NUMBERS, *_YARN_NUMBERS, *_SCALES),
        *(_YARN_SWITCH, _EXPERTS_SWITCH),
        *("normalization", "position_embedding_type", "rope_scaling_factor", "make_vocab_size_divisible_by"),
        *("num_experts", "moe_ffn_hidden_size", "moe_router_topk"),
        *("moe_token_dispatcher_type", "moe_layer_freq"),
    )
)
# What may be recorded, and with which values, besides the default of `TransformerConfig`.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "attention_softmax_in_fp32": (True, False),
    "apply_query_key_layer_scaling": (True, False),  # divides and multiplies by the same number
    "fp32_residual_connection": (True, False),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_attention_ratio": (0.0,),
    "hybrid_layer_pattern": (None,),
    "hybrid_mlp_ratio": (0.0,),
    "hybrid_override_pattern": (None,),
    "linear_attention_freq": (None,),
    _ROUTING_TYPE: _ROUTING_TYPES,
    "mtp_enabled": (False,),
    "mtp_num_layers": (0,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "restore_modelopt_state": (False,),
    "rope_type": ("rope",),
    "seq_len_interpolation_factor": (1.0,),
    "spec": (None, []),
    "squared_relu": (False,),
}
# Fields of `TransformerConfig` about parallelism, precision, speed, training, or parts that a switch in the
# table above, or one that must have its default, turns off.
_WITHOUT_EFFECT = re.compile(
    r"^(_cpu_offloading|account_for_|activation_(func_fp8|offload)|attention_(backend|dropout)|autocast|barrier"
    r"|batch_(invariant|p2p)|bf16|calculate_per|clone_scatter|config_logger|context_parallel|cp_comm|cpu_off"
    r"|cross_entropy|cuda_graph|deallocate|defer_|delay_|delta_offload|deterministic|disable_|distribute_|dsa_"
    r"|embedding_init|enable_(autocast|cuda)|ep_overlap|expert_(gtp|model|tensor)|external_cuda|fine_grained"
    r"|first_last|flash_|fp(4|8|16)|gradient_accum|gtp_|hetereogenous_dist|hidden_dropout|hierarchical_"
    r"|high_priority|hybrid_context|inference_|init_|kitchen_|linear_(conv|key|num|value)|log_max|mamba_"
    r"|max_seqlen|memory_efficient|microbatch|min_offload|mlp_chunks"
    r"|moe_(aux_loss|deepep|enable|flex|grouped|hybridep|layer_recompute|ncclep|pad_|paged|per_layer|permute"
    r"|single_grouped|token_d|z_loss)|moe_router_(bias_update|dtype|padding|quantile)|moe_shared_expert_overlap"
    r"|mtp_|mup_|nccl_|num_layers_(at|in)|num_microbatches|offload|output_layer_init|overlap_|params_dtype"
    r"|perform_init|persist|pipeline_|qk_clip|quant_recipe|recompute|sequence_parallel|symmetric|tensor_|test_"
    r"|timers|tp_|transformer_impl|use_(cpu|grouped|inference|kitchen|mamba|ring|te_|transformer_engine)"
    r"|variable_seq|virtual_|wgrad|window_attn_skip|(?!activation_func$).*(fused|fusion|_func$))"
)
_FIELDS = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}


def check_arguments(args: Mapping[str, Any], source: object) -> None:
    """The arguments of a description are those of a model that we build.

    Raises:
        ValueError: one is missing, has an impossible value, or is not understood; names it and `source`.
    """
    values = CheckedValues(args, source)
    layers = values.integer("num_layers", most=MOST_LAYERS)
    for name in _SIZES:
        values.integer(name)
    for name in _SWITCHES:
        values.boolean(name)
    for name in _NUMBERS:
        values.number(name)
    values.one_of("normalization", ("RMSNorm", "LayerNorm"))
    values.one_of("position_embedding_type", ROTARY_TYPES)
    if args["num_attention_heads"] % args["num_query_groups"]:
        raise values.wrong(
            "num_query_groups", f"a divisor of num_attention_heads, {args['num_attention_heads']}"
        )
    if args["kv_channels"] % 2:
        raise values.wrong("kv_channels", "even, to be rotated in pairs")
    if args["padded_vocab_size"] < args["vocab_size"]:
        raise values.wrong("padded_vocab_size", f"at least vocab_size, {args['vocab_size']:,}")
    _check_rotary(values, args)
    if values.any("num_experts") is not None:
        _check_experts(values, layers)
    check_optional(values, args)
    if problem := not_understood(args, MODELLED):
        raise ValueError(f"{source}: {problem}")


def _check_rotary(values: CheckedValues, args: Mapping[str, Any]) -> None:
    size = rotary_size(args)
    if args["rotary_percent"] > 1 or size < 1:
        raise values.wrong("rotary_percent", f"at most 1, and at least 1 of {args['kv_channels']} values")
    if args.get("use_rope_scaling"):
        values.number("rope_scaling_factor")
    if args["position_embedding_type"] == "yarn":
        _check_yarn(values)
        if size % 2:
            raise values.wrong("rotary_percent", f"of {args['kv_channels']} values an even number, for yarn")
    with_factors = args["position_embedding_type"] == "longrope"
    for name in ("longrope_short_factors", "longrope_long_factors") if with_factors else ():
        if len(values.numbers(name)) != math.ceil(size / 2):
            raise values.wrong(name, f"{math.ceil(size / 2)} numbers, one for each pair that is rotated")
    if with_factors:
        values.integer("longrope_original_max_position_embeddings")
    elif args.get("longrope_short_factors") is not None:
        raise values.wrong("longrope_short_factors", "absent without position_embedding_type='longrope'")


def _check_yarn(values: CheckedValues) -> None:
    for name in _YARN_NUMBERS:
        values.number(name)
    values.boolean(_YARN_SWITCH)
    for name in _SCALES:
        if values.any(name) is not None:
            values.number(name, above=-float("inf"))


def _check_experts(values: CheckedValues, layers: int) -> None:
    experts = values.integer("num_experts", most=MOST_LAYERS)
    values.integer("moe_router_topk", most=1 if values.any("moe_apply_probs_on_input", None) else experts)
    values.integer("moe_ffn_hidden_size")
    values.boolean(_EXPERTS_SWITCH)
    values.one_of(_ROUTING_TYPE, _ROUTING_TYPES, "aux_loss")
    if not is_every_layer(values.any("moe_layer_freq", 1), layers):
        values.flags("moe_layer_freq", layers)


def is_every_layer(moe_layer_freq: Any, num_layers: int) -> bool:
    """Whether a recorded frequency means experts in every layer."""
    return moe_layer_freq in (1, "1") or moe_layer_freq == [1] * num_layers


def not_understood(recorded: Mapping[str, Any], known: Collection[str] = ()) -> str | None:
    """The first name, and its value, that changes results in a way we do not model; None if there is none.

    Args:
        known: names without an effect, besides those of `TransformerConfig` that have none.

    Of a name that nobody knows, a value that says nothing is accepted: none, false, zero, or empty.
    """
    with_experts = bool(recorded.get("num_experts"))
    for name, value in recorded.items():
        if name in MODELLED or (name.startswith("moe_") and not with_experts):
            continue
        if name in _ALLOWED or (name in _FIELDS and not _WITHOUT_EFFECT.match(name)):
            accepted = _is_allowed(name, value)
        else:
            accepted = not value or name in _FIELDS or name in known
        if not accepted:
            return f"{name}={shown(value)} is not supported"
    return None


def _is_allowed(name: str, value: Any) -> bool:
    allowed = (None, *_ALLOWED.get(name, ()), _FIELDS.get(name))
    several = name == _ROUTING_TYPE and isinstance(value, list)  # one for each auxiliary loss
    return all(each in allowed for each in (value if several else [value]))
