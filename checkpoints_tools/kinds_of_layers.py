"""What a checkpoint's layers are, kind by kind: who sees what, what crosses ranks, and what KV is kept."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from megatron_star.planning.cost_model import kv_layers
from megatron_star.planning.layer_mask import LayerMask, Window

_SINKS = {"learnable": "a learned sink for each head", "off-by-one": "a sink of 0 for each head"}


def kinds_of_layers(args: Mapping[str, Any], bytes_per_value: int) -> dict[str, str]:
    """Lines of a report: one for each kind of layer, and one for a softmax that is not plain."""
    kv = kv_layers(SimpleNamespace(**args), tp_size=1, bytes_per_value=bytes_per_value)
    lines = {}
    for mask, count in kv.num_layers.items():
        kept = f"of at most the last {mask.size - 1:,}" if mask else "of all"
        lines[f"{count} x {mask.name if mask else 'full'}"] = (
            f"{_what_crosses(mask)}; KV: {count * kv.bytes_per_token:,} bytes per token, {kept}"
        )
    softmax = ", ".join(_softmax(args))
    return lines | ({"softmax": softmax} if softmax else {})


def _what_crosses(mask: LayerMask | None) -> str:
    if mask is None:
        return "in a wave, the anchor's KV crosses ranks (star), or all that is seen (exact, neighbors)"
    if isinstance(mask, Window):
        return f"exact; the KV of {mask.size - 1:,} tokens before a segment crosses ranks"
    return "exact; the KV of its chunk's tokens before a segment crosses ranks"


def _softmax(args: Mapping[str, Any]) -> Iterator[str]:
    if (kind := args.get("softmax_type")) in _SINKS:
        yield _SINKS[kind]
    if args.get("attention_softcap"):
        yield f"scores capped at {args['attention_softcap']:g}"
    if args.get("softmax_scale"):
        yield f"scale {args['softmax_scale']:g}"


def positions(args: Mapping[str, Any]) -> str:
    """How layers know positions: the rotary embedding, its scaling, and layers that have none."""
    parts = [f"rotary, base {args['rotary_base']:,.10g}", *_scaling(args)]
    if (share := args.get("rotary_percent", 1.0)) != 1.0:
        parts.append(f"of {share:.0%} of a head")
    if args.get("window_rotary_base"):
        parts.append(f"base {args['window_rotary_base']:,.10g} in windows")
    if args.get("no_rope_freq"):
        parts.append(f"none in {sum(args['no_rope_freq'])} of {args['num_layers']} layers")
    if args.get("query_scale_beta"):
        layers = sum(args.get("query_scale_layers") or [1] * args["num_layers"])
        parts.append(f"queries of {layers} layers scaled from position {args['query_scale_floor']:,}")
    return ", ".join(parts)


def _scaling(args: Mapping[str, Any]) -> Iterator[str]:
    if args.get("use_rope_scaling"):
        yield f"Llama-3 scaling by {args['rope_scaling_factor']:g}"
    if args["position_embedding_type"] == "yarn":
        yield f"YaRN scaling by {args['rotary_scaling_factor']:g}"
    if args["position_embedding_type"] == "longrope":
        yield f"longrope beyond {args['longrope_original_max_position_embeddings']:,} tokens"
    if args.get("rotary_seq_len_interpolation_factor"):
        yield f"linear scaling by {args['rotary_seq_len_interpolation_factor']:g}"
