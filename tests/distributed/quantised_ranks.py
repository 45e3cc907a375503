"""What the ranks of test_quantised_contexts.py run: contexts in 8 bits, and their slow twin."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from ranks import random_star_model
from torch import Tensor
from turns import opened_turn

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.attention.kv_formats import kv_format
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.attention.quantised_kv import QuantisedTensor
from megatron_star.attention.stored_kv import AS_COMPUTED, ComputedKv, ComputedPiece, KvFormat
from megatron_star.config import StarConfig
from megatron_star.engine.command import Command, Fed
from megatron_star.engine.executor import RankExecutor, planner_of
from megatron_star.planning.cost_model import kv_layers
from megatron_star.planning.plan import ContextPlan

NUM_QUERY, NUM_GENERATED = 5, 3


class RoundedKv:
    """Stored as computed; but what is written is rounded to 8 bits and back, when it is forgotten."""

    def __init__(self, plain: ComputedKv, dtype: torch.dtype) -> None:
        self.plain, self.dtype, self.num_bytes = plain, dtype, plain.num_bytes
        self._exact: list[tuple[int, KeyValue]] = []

    def write(self, first_row: int, key: Tensor, value: Tensor) -> None:
        self.plain.write(first_row, self._rounded(key), self._rounded(value))

    def keep_exact(self, first_row: int, key: Tensor, value: Tensor) -> None:
        self.plain.write(first_row, key, value)
        self._exact.append((first_row, (key, value)))

    def forget_exact(self) -> None:
        for first_row, exact in self._exact:
            self.write(first_row, *exact)
        self._exact.clear()

    def read(self, rows: slice) -> KeyValue:
        return self.plain.read(rows)

    def read_of_heads(self, rows: Tensor) -> KeyValue:
        return self.plain.read_of_heads(rows)

    def held(self, num_rows: int) -> ComputedPiece:
        return self.plain.held(num_rows)

    def _rounded(self, tensor: Tensor) -> Tensor:
        kept = QuantisedTensor.empty(tensor.size(0), tensor, self.dtype)
        kept.write(tensor)
        return kept.read(tensor.dtype)


@dataclass(frozen=True)
class RoundedFormat:
    """Of the slow twin: attention never sees 8 bits."""

    dtype: torch.dtype
    name: str = "rounded"

    def spare_capacity(self, num_tokens: int) -> int:
        return 0

    def empty(self, num_tokens: int, like: KeyValue) -> RoundedKv:
        return RoundedKv(ComputedKv.empty(num_tokens, like), self.dtype)


class Found(NamedTuple):
    """Of a chain of contexts, on one rank.

    Attributes:
        logits: after the query, and after each token behind it.
        num_bytes, planned: of each context.
        num_exact: of all layers, tokens that are still kept as computed.
    """

    logits: Tensor
    num_bytes: list[int]
    planned: list[int]
    num_exact: int


class Case(NamedTuple):
    """Contexts that end at these edges, each extending the one before."""

    star: StarConfig
    edges: tuple[int, ...]


def answers(
    args: dict[str, Any], tp_size: int, kv_dtype: str, token_ids: list[int], cases: Sequence[Case]
) -> list[tuple[Found, Tensor, Tensor]]:
    """Of each case what is found in 8 bits; logits of the slow twin; logits as computed."""
    star_model, _ = random_star_model(args, tp_size)
    form = kv_format(kv_dtype, device=star_model.device, head_size=star_model.model.config.kv_channels)
    formats = form, RoundedFormat(form.dtype), AS_COMPUTED
    found = []
    for case in cases:
        of_formats = [
            _answer(RankExecutor(replace(star_model, kv_format=one)), token_ids, case, one) for one in formats
        ]
        found.append((of_formats[0], of_formats[1].logits, of_formats[2].logits))
    return found


def changed_by_reading(args: dict[str, Any], token_ids: list[int], star: StarConfig) -> list[float]:
    """Of each layer of a context of one wave, which share of what int8 stores is not what was computed
    without, rounded: of the last bit of a sum, a few are."""
    star_model, _ = random_star_model(args, 1)
    form = kv_format("int8", device=star_model.device, head_size=star_model.model.config.kv_channels)
    plan = planner_of(star_model).plan(len(token_ids), star).plan
    assert len(plan.waves) == 1
    quantised, computed = (
        encode_context(replace(star_model, kv_format=one), token_ids, plan) for one in (form, AS_COMPUTED)
    )
    num_rows, shares = plan.num_owned_tokens(star_model.exchange.cp_rank), []
    for layer in range(1, star_model.model.config.num_layers + 1):
        exact, found = computed._layers[layer].read(slice(num_rows)), quantised._layers[layer]
        rounded = form.empty(num_rows, exact)
        rounded.write(0, *exact)
        differ = [found.key.numbers != rounded.key.numbers, found.value.numbers != rounded.value.numbers]
        shares.append(torch.cat(differ).float().mean().item())
    return shares


def _answer(executor: RankExecutor, token_ids: list[int], case: Case, form: KvFormat) -> Found:
    exchange, config = executor.star_model.exchange, executor.star_model.model.config
    plans: list[ContextPlan] = []
    for turn, end in enumerate(case.edges):
        executor.execute(Command(open_context=opened_turn(turn, token_ids[:end], case.star, case.edges)))
        plans.append(executor.contexts[turn].plan)
        for wave in range(len(plans[-1].waves)):
            executor.execute(Command(encode_wave=(turn, wave)))
    executor.execute(Command(open_sequences=[(0, len(plans) - 1, exchange.cp_size - 1)]))
    rest = token_ids[case.edges[-1] :]
    fed = [rest[:NUM_QUERY], *([token] for token in rest[NUM_QUERY : NUM_QUERY + NUM_GENERATED])]
    logits = torch.cat([executor.execute(Command(feed=[Fed(0, tokens)])) for tokens in fed])
    if form.name not in ("int8", "fp8"):
        return Found(logits, [], [], 0)
    layers = kv_layers(
        config, tp_size=config.tensor_model_parallel_size, bytes_per_value=4, kv_dtype=form.name
    )
    contexts = executor.contexts.values()
    return Found(
        logits,
        [context.num_bytes for context in contexts],
        [layers.of_context(plan)[exchange.cp_rank] for plan in plans],
        sum(len(stored._exact) for context in contexts for stored in context._layers.values()),
    )
