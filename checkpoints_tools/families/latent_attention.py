"""Multi-head latent attention, of DeepSeek's models and those built after them: its tensors and arguments.

Keys and values of all heads are up-projected from one latent of a token, beside one rotated key that all
heads share. Queries may have a latent, too. Tensors have the keys of Megatron's TransformerEngine layers, in
which the norm of a latent belongs to the projection after it.
"""

from collections.abc import Mapping
from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.rotary_arguments import latent_rotary_arguments
from checkpoints_tools.families.weight import AS_IS, KEY_HALVES, QUERY_HALVES, Weight
from checkpoints_tools.families.weights import layer_weight
from megatron_star.model.checked_values import CheckedValues

# transformers' models give the norms of latents no epsilon of their own; whatever rms_norm_eps says, it is
# the default of their class.
_EPSILON_OF_LATENTS = 1e-6


def latent_attention_arguments(values: CheckedValues) -> dict[str, Any]:
    """Of a decoder with latent attention in all layers and a dense MLP, which a family with experts changes.

    Raises:
        ValueError: heads of keys and of queries are not as many, or we do not rotate in the same way.
    """
    arguments = decoder_arguments(values)
    heads = arguments["num_attention_heads"]
    if arguments["num_query_groups"] != heads:
        raise values.wrong("num_key_value_heads", f"{heads}, as num_attention_heads: all heads have a latent")
    plain, rotated = values.integer("qk_nope_head_dim"), values.integer("qk_rope_head_dim", least=2)
    if rotated % 2:
        raise values.wrong("qk_rope_head_dim", "even, to be rotated in pairs")
    has_query_latent = values.any("q_lora_rank") is not None
    return {
        **arguments,
        **latent_rotary_arguments(values, arguments),
        "group_query_attention": False,
        "multi_latent_attention": True,
        "q_lora_rank": values.integer("q_lora_rank") if has_query_latent else None,
        "kv_lora_rank": values.integer("kv_lora_rank"),
        "qk_head_dim": plain,
        "qk_pos_emb_head_dim": rotated,
        "v_head_dim": values.integer("v_head_dim"),
        "kv_channels": plain + rotated,
        "qk_layernorm": True,
        "rotary_interleaved": True,  # in all of Megatron's latent attention
        **_epsilon_of_latents(arguments["norm_epsilon"]),
    }


def _epsilon_of_latents(norm_epsilon: float) -> dict[str, float]:
    return {} if norm_epsilon == _EPSILON_OF_LATENTS else {"latent_norm_epsilon": _EPSILON_OF_LATENTS}


def _without_query_latent(args: Mapping[str, Any]) -> bool:
    return not args.get("q_lora_rank")


def latent_attention(*, rotates_halves: bool = False) -> tuple[Weight, ...]:
    """With the norm before it.

    Rows of each head are in the same order in both formats: of a query what is not rotated, then what is; of
    an up-projection the key, then the value. Tensor parallelism cuts the down-projections, too, and gathers
    what they give.

    Args:
        rotates_halves: transformers' model rotates the first half of those values with the second; else
            neighboring values, as Megatron does.
    """
    of_query, of_key = (QUERY_HALVES, KEY_HALVES) if rotates_halves else (AS_IS, AS_IS)
    return (
        layer_weight("input_layernorm.weight", ("input_layernorm.weight", ("hidden",))),
        layer_weight(
            "self_attention.linear_q_proj.weight",
            ("self_attn.q_proj.weight", ("query", "hidden")),
            layout=of_query,
            split_axis=0,
            only_with=_without_query_latent,
        ),
        layer_weight(
            "self_attention.linear_q_down_proj.weight",
            ("self_attn.q_a_proj.weight", ("query_latent", "hidden")),
            split_axis=0,
            only_with="q_lora_rank",
        ),
        layer_weight(
            "self_attention.linear_q_up_proj.layer_norm_weight",
            ("self_attn.q_a_layernorm.weight", ("query_latent",)),
            only_with="q_lora_rank",
        ),
        layer_weight(
            "self_attention.linear_q_up_proj.weight",
            ("self_attn.q_b_proj.weight", ("query", "query_latent")),
            layout=of_query,
            split_axis=0,
            only_with="q_lora_rank",
        ),
        layer_weight(
            "self_attention.linear_kv_down_proj.weight",
            ("self_attn.kv_a_proj_with_mqa.weight", ("latent_and_rotated_key", "hidden")),
            layout=of_key,
            split_axis=0,
        ),
        layer_weight(
            "self_attention.linear_kv_up_proj.layer_norm_weight",
            ("self_attn.kv_a_layernorm.weight", ("latent",)),
        ),
        layer_weight(
            "self_attention.linear_kv_up_proj.weight",
            ("self_attn.kv_b_proj.weight", ("plain_keys_and_values", "latent")),
            split_axis=0,
        ),
        layer_weight(
            "self_attention.linear_proj.weight",
            ("self_attn.o_proj.weight", ("hidden", "values")),
            split_axis=1,
        ),
    )
