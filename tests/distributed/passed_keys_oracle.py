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
from typing import Any, NamedTuple

import torch
from passed_keys_ranks import NUM_GENERATED, Answer, Case
from reference import block_edges, extended_edges, mask_of_named, named_positions, window_mask, with_query
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

FULL, WINDOW = "full_attention", "sliding_attention"
Positions = tuple[tuple[int, ...], ...]
"""For each block, which keys of one KV head it names."""
Selection = dict[int, tuple[Positions, ...]]
"""By layer, from 1, for each KV head."""
_NAME = "with_a_mask_for_each_head"


class Blocks(NamedTuple):
    """The definition of who sees which keys; its twin is `StarMask`."""

    edges: list[int]
    anchor_size: int
    passed_keys: int
    neighbor_blocks: int

    @classmethod
    def of(cls, case: Case) -> "Blocks":
        """Of a case's last context."""
        star, (first, *later) = case.star, case.turns
        edges = block_edges(first, star.block_size)
        for end in later:
            edges = extended_edges(edges, end, star.block_size)
        anchor_size = star.block_size if star.anchor_size is None else star.anchor_size
        return cls(edges, min(anchor_size, edges[1]), star.passed_keys or 0, star.neighbor_blocks)

    def name(self, key: Tensor) -> Positions:
        """What the blocks name of the keys [n, hn] of one KV head."""
        return tuple(map(tuple, named_positions(key, self.edges, self.anchor_size, self.passed_keys)))

    def check(self, named: Positions) -> None:
        """That each block names so many different keys of its own, and the first one the anchor first."""
        assert named[0][: self.anchor_size] == tuple(range(self.anchor_size))
        for block, (start, end) in enumerate(pairwise(self.edges)):
            num_named = min(end - start, self.passed_keys + (0 if block else self.anchor_size))
            assert len({*named[block]} & {*range(start, end)}) == len(named[block]) == num_named

    def mask(self, named: Positions) -> Tensor:
        """[n, n] bool."""
        return mask_of_named(
            self.edges,
            [list(of_block) for of_block in named],
            anchor_size=self.anchor_size,
            passed_keys=self.passed_keys,
            neighbor_blocks=self.neighbor_blocks,
        )


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
    blocks, selection = Blocks.of(case), {}

    def see(layer: int, key: Tensor) -> Tensor:
        selection[layer] = tuple(blocks.name(of_head) for of_head in key)
        return torch.stack([blocks.mask(named) for named in selection[layer]])

    return _logits_of_case(directory, token_ids, case, see), selection


def logits_of_selection(
    directory: Path,
    token_ids: tuple[int, ...],
    case: Case,
    selection: Selection,
    blocks: Blocks | None = None,
) -> Tensor:
    """The same where these keys are selected. What context tokens see in the last layer reaches nobody.

    blocks: that see them, if not those of the case.
    """
    blocks = blocks or Blocks.of(case)

    def see(layer: int, key: Tensor) -> Tensor:
        if layer not in selection:
            return torch.ones(1, key.size(1), key.size(1), dtype=torch.bool).tril()
        return torch.stack([blocks.mask(named) for named in selection[layer]])

    return _logits_of_case(directory, token_ids, case, see)


def _logits_of_case(
    directory: Path, token_ids: tuple[int, ...], case: Case, see: Callable[[int, Tensor], Tensor]
) -> Tensor:
    end = case.turns[-1] + case.query
    found = _logits(directory, list(token_ids[: end + NUM_GENERATED]), see, case.turns[-1])
    return found[end - 1 :]


def selection_of_run(of_ranks: Sequence[Answer], blocks: Blocks) -> Selection:
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
            assert [*range(len(blocks.edges) - 1)] == sorted(named)
            of_blocks = [torch.cat(named[block], -1)[:, 0] for block in sorted(named)]
            heads = tuple(
                tuple(_positions(context[:, head], of_block[:, head]) for of_block in of_blocks)
                for head in range(context.size(1))
            )
            for of_head in heads:
                blocks.check(of_head)
            selection[layer] = (*selection.get(layer, ()), *heads)
    return selection


def _context_kv(held: Sequence[tuple[list[int], Tensor, Tensor]]) -> Tensor:
    """[n, ng, 2 * hn]: keys and values of a layer, which each rank holds a part of."""
    where = torch.cat([torch.tensor(positions) for positions, *_ in held if positions])
    kv = torch.cat([torch.cat((key, value), -1)[:, 0] for positions, key, value in held if positions])
    assert where.sort().values.tolist() == [*range(len(where))]
    return kv[where.argsort()]


def _positions(context: Tensor, named: Tensor) -> tuple[int, ...]:
    """Rows of [n, 2 * hn] that equal those of [num_named, 2 * hn]."""
    row, position = (named[:, None] == context).all(-1).nonzero(as_tuple=True)
    assert row.tolist() == [*range(len(named))], "what is named is not one key of the context each"
    return tuple(position.tolist())
