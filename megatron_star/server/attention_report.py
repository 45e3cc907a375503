"""Where an answer looked in its context, for `usage.star`."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_star.engine.attention_map import AttentionMap

MOST_EXCERPT_TOKENS = 64


def excerpts(
    tokenizer: PreTrainedTokenizerBase, context_tokens: Sequence[int], attention_map: AttentionMap
) -> list[str]:
    """The text of each piece of the map, as far as its first `MOST_EXCERPT_TOKENS` tokens have it."""
    ends = [min(piece.end, piece.start + MOST_EXCERPT_TOKENS) for piece in attention_map.pieces]
    pieces = [
        list(context_tokens[piece.start : end]) for piece, end in zip(attention_map.pieces, ends, strict=True)
    ]
    return tokenizer.batch_decode(pieces, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def attention_report(attention_map: AttentionMap | None, texts: list[str] | None) -> dict[str, Any]:
    """Fields of `usage.star`: none, where there is no map."""
    if attention_map is None:
        return {}
    return {
        "attention_map": [
            [start, end, round(mass, 6), round(peak, 6)] for start, end, mass, peak in attention_map.pieces
        ],
        "attention_texts": texts,
        "attention_elsewhere": round(attention_map.elsewhere, 6),
        "attention_rows": attention_map.num_rows,
    }
