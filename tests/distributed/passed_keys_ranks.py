"""What the ranks of test_passed_keys.py run: contexts in turns; what each rank names and holds of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from ranks import load
from torch import Tensor
from turns import opened_turn

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.config import StarConfig
from megatron_star.engine.command import Command, Fed
from megatron_star.engine.executor import RankExecutor
from megatron_star.planning.layer_mask import layer_masks
from megatron_star.planning.passing import wave_passing
from megatron_star.planning.plan import ContextPlan

NUM_GENERATED = 2


class Case(NamedTuple):
    """A context, and a query with the tokens after it.

    Attributes:
        turns: where the contexts end that are encoded one after the other, each extending the one before.
        query: tokens that are fed at once; then NUM_GENERATED are, one by one.
    """

    star: StarConfig
    turns: tuple[int, ...]
    query: int = 5


class Answer(NamedTuple):
    """Of a case, on one rank. Layers are numbered from 1; heads are those of its TP rank.

    Attributes:
        logits: [1 + NUM_GENERATED, vocabulary]: after the query, and after each token behind it.
        held: of each layer that names keys, positions of the context tokens whose KV is here, and that KV.
        named: by layer and block, the KV of the keys that this rank names.
        sent: calls and bytes while contexts were encoded, as `Exchange.counts` has them.
        plans: by turn.
    """

    tp_rank: int
    logits: Tensor
    held: dict[int, tuple[list[int], Tensor, Tensor]]
    named: dict[tuple[int, int], KeyValue]
    sent: dict[str, int]
    plans: tuple[ContextPlan, ...]


def answers(checkpoint: str, tp_size: int, token_ids: list[int], cases: Sequence[Case]) -> list[Answer]:
    """Of each case, whose context, query and later tokens are the first of these.

    What nobody has written yet is NaN: whoever reads padding shows it.
    """
    star_model, groups = load(checkpoint, tp_size)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    try:
        return [answer(star_model, groups.model.tp.rank(), token_ids, case) for case in cases]
    finally:
        torch.use_deterministic_algorithms(False)


def answer(star_model: StarModel, tp_rank: int, token_ids: list[int], case: Case) -> Answer:
    executor, exchange = RankExecutor(star_model), star_model.exchange
    exchange.counts.clear()
    contexts = [_encoded(executor, turn, token_ids, case) for turn in range(len(case.turns))]
    sent, context = dict(exchange.counts), contexts[-1]
    executor.execute(Command(open_sequences=[(0, len(contexts) - 1, exchange.cp_size - 1)]))
    rest = token_ids[case.turns[-1] :]
    later = rest[case.query : case.query + NUM_GENERATED]
    fed = [rest[: case.query], *([token] for token in later)]
    logits = torch.cat([executor.execute(Command(feed=[Fed(0, tokens)])) for tokens in fed])
    layers = [
        number for number, mask in enumerate(layer_masks(star_model.model.config)[:-1], 1) if mask is None
    ]
    return Answer(
        tp_rank,
        logits,
        {layer: _held(context, layer, exchange.cp_rank) for layer in layers},
        {
            (layer, block): tuple(
                tensor.clone() for tensor in context.named(layer, block, context.plan.mask.num_named(block))
            )
            for layer in layers
            for block in _named_here(context, exchange.cp_rank)
        },
        sent,
        tuple(one.plan for one in contexts),
    )


def _encoded(executor: RankExecutor, turn: int, token_ids: list[int], case: Case) -> EncodedContext:
    executor.execute(Command(open_context=opened_turn(turn, token_ids, case.star, case.turns)))
    context = executor.contexts[turn]
    for wave in range(len(context.plan.waves)):
        executor.execute(Command(encode_wave=(turn, wave)))
    return context


def _chain(context: EncodedContext) -> list[EncodedContext]:
    """The contexts that it extends, the first one first, and itself."""
    return [*(_chain(context.parent) if context.parent else ()), context]


def _held(context: EncodedContext, layer: int, cp_rank: int) -> tuple[list[int], Tensor, Tensor]:
    positions = [
        token
        for one in _chain(context)
        for segment in one.plan.owned(cp_rank)
        for token in range(segment.start, segment.end)
    ]
    held = list(context.held(layer))
    if not held:
        return [], torch.empty(0), torch.empty(0)
    return positions, *(torch.cat(tensors) for tensors in zip(*held, strict=True))


def _named_here(context: EncodedContext, cp_rank: int) -> Iterator[int]:
    for one in _chain(context):
        for wave in one.plan.waves:
            yield from (named.block for named in wave_passing(one.plan, wave).named if named.owner == cp_rank)
