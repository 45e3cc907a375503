"""The oracle: one dense forward of transformers' own model, with the mask for each layer and KV head that a
selection of keys implies.

The selection is given, or is made by the slow twin in `reference.py` of the keys that the model itself has.
The attention is the model's own plain one, with its sinks and caps: only the mask is ours.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from passed_keys_ranks import NUM_GENERATED, Answer, Case
from reference import PassingBlocks, window_mask, with_query
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

FULL, WINDOW = "full_attention", "sliding_attention"
Selection = dict[int, list[list[list[int]]]]
"""By layer, from 1: for each KV head and each block, the positions of the keys that it names."""
_NAME = "with_a_mask_for_each_head"


@cache
def hugging_face_model(directory: Path) -> PreTrainedModel:
    """In float32, whose attention is what is registered when it is called."""
    AttentionInterface.register(_NAME, lambda *args, **options: None)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=_NAME)
    return loaded.eval()


def _logits(
    directory: Path, token_ids: list[int], see: Callable[[int, Tensor], Tensor], num_context: int
) -> Tensor:
    """[tokens, vocabulary].

    Args:
        see: given a layer, from 1, and its keys [ng, num_context, hn], the mask [ng or 1, num_context,
            num_context], bool, of its KV heads; of layers with full attention.
    """
    model = hugging_face_model(directory)
    kinds = getattr(model.config, "layer_types", None) or [FULL] * model.config.num_hidden_layers
    num_tokens = len(token_ids)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **options: Any) -> Any:
        if kinds[module.layer_idx] == FULL:
            of_heads = see(module.layer_idx + 1, key[0, :, :num_context])
            visible = torch.stack([with_query(one, num_tokens - num_context) for one in of_heads])
            visible = visible.repeat_interleave(query.size(1) // visible.size(0), 0)
        else:
            visible = window_mask(num_tokens, model.config.sliding_window)[None]
        additive = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, additive[None], **options)

    AttentionInterface.register(_NAME, attend)
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


@cache
def answer_by_twin(directory: Path, token_ids: tuple[int, ...], case: Case) -> tuple[Tensor, Selection]:
    """Logits after the query and each later token, where the slow twin selects of each layer's own keys."""
    blocks, selection = PassingBlocks.of(case.turns, case.star), {}

    def see(layer: int, key: Tensor) -> Tensor:
        selection[layer] = [blocks.name(of_head) for of_head in key]
        return torch.stack([blocks.mask(named) for named in selection[layer]])

    return _logits_of_case(directory, token_ids, case, see), selection


def logits_of_selection(
    directory: Path, token_ids: tuple[int, ...], case: Case, selection: Selection
) -> Tensor:
    """The same where these keys are selected. What context tokens see in the last layer reaches nobody."""
    heads = ((layer, tuple(tuple(map(tuple, head)) for head in of)) for layer, of in selection.items())
    return _logits_of_heads(directory, token_ids, case, tuple(sorted(heads)))


@cache
def _logits_of_heads(
    directory: Path, token_ids: tuple[int, ...], case: Case, selection: tuple[tuple[int, Any], ...]
) -> Tensor:
    blocks = PassingBlocks.of(case.turns, case.star)

    def see(layer: int, key: Tensor) -> Tensor:
        if layer not in dict(selection):
            return torch.ones(1, key.size(1), key.size(1), dtype=torch.bool).tril()
        return torch.stack([blocks.mask(named) for named in dict(selection)[layer]])

    return _logits_of_case(directory, token_ids, case, see)


def _logits_of_case(
    directory: Path, token_ids: tuple[int, ...], case: Case, see: Callable[[int, Tensor], Tensor]
) -> Tensor:
    end = case.turns[-1] + case.query
    found = _logits(directory, list(token_ids[: end + NUM_GENERATED]), see, case.turns[-1])
    return found[end - 1 :]


def selection_of_run(of_ranks: Sequence[Answer], blocks: PassingBlocks) -> Selection:
    """Where the keys are that ranks named: KV of the context with the same bits, in the same head.

    Raises:
        AssertionError: what a block names is not made of keys of its own, or not what it has to name first.
    """
    selection: Selection = {}
    for tp_rank in range(1 + max(answer.tp_rank for answer in of_ranks)):
        cp_ranks = [answer for answer in of_ranks if answer.tp_rank == tp_rank]
        for layer in cp_ranks[0].held:
            context = _context_kv([answer.held[layer] for answer in cp_ranks])
            named = {key[1]: kv for answer in cp_ranks for key, kv in answer.named.items() if key[0] == layer}
            assert sorted(named) == [*range(blocks.num_blocks)]
            of_blocks = [torch.cat(named[block], -1)[:, 0] for block in sorted(named)]
            for head in range(context.size(1)):
                found = [_positions(context[:, head], of_block[:, head]) for of_block in of_blocks]
                _check(found, blocks)
                selection.setdefault(layer, []).append(found)
    return selection


def _check(named: Sequence[list[int]], blocks: PassingBlocks) -> None:
    assert named[0][: blocks.anchor_size] == [*range(blocks.anchor_size)]
    for block, (start, end) in enumerate(pairwise(blocks.edges)):
        own = {*named[block]} & {*range(start, end)}
        assert len(own) == len(named[block]) == blocks.num_named(block)


def _context_kv(held: Sequence[tuple[list[int], Tensor, Tensor]]) -> Tensor:
    """[n, ng, 2 * hn]: keys and values of a layer, which each rank holds a part of."""
    where = torch.cat([torch.tensor(positions) for positions, *_ in held if positions])
    kv = torch.cat([torch.cat((key, value), -1)[:, 0] for positions, key, value in held if positions])
    assert where.sort().values.tolist() == [*range(len(where))]
    return kv[where.argsort()]


def _positions(context: Tensor, named: Tensor) -> list[int]:
    """Rows of [n, 2 * hn] that equal those of [num_named, 2 * hn]."""
    row, position = (named[:, None] == context).all(-1).nonzero(as_tuple=True)
    assert row.tolist() == [*range(len(named))], "what is named is not one key of the context each"
    return position.tolist()
