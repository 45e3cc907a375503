"""The arguments of latent attention as Megatron-LM and Megatron Bridge have them, and in our names.

Megatron's latent attention has a rotary embedding of its own, which `rope_type` and the fields of
`MLATransformerConfig` describe: what describes that of other models says nothing there. It rotates
neighboring values, and refuses a configuration that says so.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig

_YARN = {
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
_SCALES = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
_WITHOUT_EFFECT = ("rope_type", "cache_mla_latents", "mla_down_proj_fusion", *_YARN)


def for_megatron(args: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron-LM needs beside, or instead of, the arguments of a model with latent attention."""
    if not args.get("multi_latent_attention"):
        return {}
    is_yarn = args["position_embedding_type"] == "yarn"
    return {
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        "rope_type": "yarn" if is_yarn else "rope",
        "rotary_scaling_factor": args["rotary_scaling_factor"] if is_yarn else 1.0,
        **({theirs: args[ours] for theirs, ours in _YARN.items()} if is_yarn else {}),
    }


def of_megatron(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What was recorded, of a model with latent attention in our names."""
    if not recorded.get("multi_latent_attention"):
        return dict(recorded)
    found = {name: value for name, value in recorded.items() if name not in _WITHOUT_EFFECT}
    found |= {name: _or_default(recorded, name) for name in _SCALES}
    found |= {ours: _or_default(recorded, theirs) for theirs, ours in _YARN.items()}
    is_yarn = _or_default(recorded, "rope_type") == "yarn" and found["rotary_scaling_factor"] != 1
    found |= {
        "position_embedding_type": "yarn" if is_yarn else "rope",  # with a factor of 1 YaRN changes nothing
        "yarn_correction_range_round_to_int": True,
        "rotary_interleaved": True,
        "group_query_attention": False,
    }
    sizes = [_or_default(recorded, name) for name in ("qk_head_dim", "qk_pos_emb_head_dim")]
    if all(type(size) is int for size in sizes):
        found["kv_channels"] = sum(sizes)
    if recorded.get("norm_epsilon") is not None:
        found.setdefault("latent_norm_epsilon", recorded["norm_epsilon"])
    return found


def _or_default(recorded: Mapping[str, Any], name: str) -> Any:
    value = recorded.get(name)
    return getattr(MLATransformerConfig, name) if value is None else value
