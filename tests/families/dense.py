"""The oracle: one dense forward of transformers' own model, with the plan's mask for each kind of layer.

Nothing in transformers is patched. Its models take a 4-D additive mask as it is. Those with several kinds of
layers take a dictionary of them, by the names that `layer_types` of their configuration has. A model whose
layers are all of one kind takes one mask.
"""

from functools import cache
from pathlib import Path

import torch
from cases import Case
from reference import block_edges, chunk_mask, extended_edges, mask_of_blocks, window_mask, with_query
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from megatron_star.config import StarConfig

FULL, WINDOW, CHUNK = "full_attention", "sliding_attention", "chunked_attention"


def kinds_of_layers(config: PreTrainedConfig) -> tuple[str, ...]:
    """For each layer, by transformers' names."""
    if getattr(config, "layer_types", None):
        return tuple(config.layer_types)
    kind = FULL if getattr(config, "sliding_window", None) is None else WINDOW
    return (kind,) * config.num_hidden_layers


@cache
def hugging_face_model(directory: Path) -> PreTrainedModel:
    """In float32, with transformers' own plain attention."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return loaded.eval()


def unmasked_logits(directory: Path, token_ids: list[int]) -> Tensor:
    """[tokens, vocabulary] of the model as it is."""
    with torch.inference_mode():
        return hugging_face_model(directory)(torch.tensor([token_ids])).logits[0]


def masked_logits(
    directory: Path, token_ids: list[int], full: Tensor, *, window: int | None = None
) -> Tensor:
    """[tokens, vocabulary].

    Args:
        full: [tokens, tokens], bool, True where a row sees a column, of the layers with full attention.
        window: of the layers that have one, if it is not the model's own.
    """
    model = hugging_face_model(directory)
    config, kinds = model.config, set(kinds_of_layers(model.config))
    masks = {FULL: full}
    if WINDOW in kinds:
        masks[WINDOW] = window_mask(len(token_ids), window or config.sliding_window)
    if CHUNK in kinds:
        masks[CHUNK] = chunk_mask(len(token_ids), window or config.attention_chunk_size)
    additive = {kind: _additive(masks[kind]) for kind in kinds}
    with torch.inference_mode():
        given = additive if len(kinds) > 1 else additive.popitem()[1]
        return model(torch.tensor([token_ids]), attention_mask=given).logits[0]


def _additive(visible: Tensor) -> Tensor:
    """[1, 1, tokens, tokens], float32."""
    return torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)[None, None]


def case_mask(case: Case) -> Tensor:
    """[tokens, tokens], bool, of layers with full attention: the plan's, and after it everything."""
    star, (first, *later) = case.star, case.turns
    edges = block_edges(first, star.block_size)
    for end in later:
        edges = extended_edges(edges, end, star.block_size)
    num_rest = len(case.token_ids) - case.turns[-1]
    return with_query(mask_of_blocks(edges, _anchor_size(star), star.neighbor_blocks), num_rest)


def _anchor_size(star: StarConfig) -> int:
    return star.block_size if star.anchor_size is None else star.anchor_size


@cache
def case_logits(directory: Path, case: Case) -> Tensor:
    """[1 + generated, vocabulary]: after the query, and after each token that follows it.

    In exact mode, of the model as it is: no mask is given.
    """
    token_ids = case.token_ids
    if case.star.mode == "exact":
        logits = unmasked_logits(directory, token_ids)
    else:
        logits = masked_logits(directory, token_ids, case_mask(case))
    return logits[case.turns[-1] + case.query - 1 :]
