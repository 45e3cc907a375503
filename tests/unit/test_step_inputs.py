"""What a step's inputs say of tails: followed by hand, address by address, against what rows have to see."""

import ctypes
import gc
from contextlib import ExitStack
from random import Random
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_star.algorithm import recent_kv, tail
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.kv_pieces import KvPiece
from megatron_star.algorithm.step_inputs import MOST_ROWS, FedSequence, StepInputs, TailLayers
from megatron_star.algorithm.tail import LayerKind, Tail
from megatron_star.attention import stored_kv
from megatron_star.config import StarConfig
from megatron_star.planning import kv_memory
from megatron_star.planning.kv_memory import MOST_PROPOSED_TOKENS
from megatron_star.planning.layer_mask import Chunk, Window
from megatron_star.planning.plan import ContextPlan

KINDS = (
    LayerKind(None, (1, 4)),
    LayerKind(Window(13), (2, 5)),
    LayerKind(Window(300), (3,)),
    LayerKind(Chunk(16), (6, 7)),
)
LAYERS = TailLayers(KINDS, softcap=None, kernels=None)
CPU = torch.device("cpu")
CHUNK_TOKENS = 40


@pytest.fixture(autouse=True)
def _laid_out_as_on_a_gpu():
    def tokens_first(num_tokens: int, like: Tensor) -> Tensor:
        return like.new_full((num_tokens, *like.shape[1:]), -1.0)

    with ExitStack() as stack:
        for module in (stored_kv, recent_kv, tail):
            stack.enter_context(patch.object(module, "empty_kv", tokens_first))
        stack.enter_context(patch.object(kv_memory, "TAIL_CHUNK_TOKENS", CHUNK_TOKENS))
        yield


def context(num_tokens: int, cp_rank: int = 0) -> EncodedContext:
    """On one of two ranks; of each layer with a mask the key of a token is its position."""
    plan = ContextPlan.build(num_tokens, 2, StarConfig(mode="exact"))
    encoded = EncodedContext(plan, cp_rank)
    for layer in KINDS[0].layers:
        for segment in plan.owned(cp_rank):
            encoded.store(layer, segment.start, *_tokens(range(segment.start, segment.end)))
    for kind in KINDS[1:]:
        for layer in kind.layers:
            pieces = [KvPiece(s.start, s.end, *_tokens(range(s.start, s.end))) for s in plan.owned(cp_rank)]
            encoded.keep_recent(layer, kind.mask, pieces, num_tokens)
    return encoded


def _tokens(numbers: list[int] | range) -> tuple[Tensor, Tensor]:
    key = torch.tensor(list(numbers), dtype=torch.float64)[:, None, None, None]
    return key, -key


class Follower:
    """A sequence, whose tokens are numbers, and all that its tail was given."""

    def __init__(self, encoded: EncodedContext) -> None:
        self.context, self.tail, self.numbers = encoded, Tail(encoded), []

    def fed(self, count: int) -> FedSequence:
        return FedSequence(self.context, self.tail, len(self.numbers), [1] * count)

    def append_by_loop(self, numbers: list[int]) -> None:
        """As the loop does."""
        for kind in KINDS:
            for layer in kind.layers:
                new = len(self.numbers), *_tokens(numbers)
                if kind.mask:
                    self.tail.append_recent(layer, kind.mask, *new)
                else:
                    self.tail.append(layer, *new)
        self.numbers += numbers

    def expected(self, kind: LayerKind, row: int) -> set[float]:
        """What row of the tail sees in such a layer."""
        position, end = self.context.plan.num_tokens + row, self.context.plan.num_tokens
        first = kind.mask.first_seen(position) if kind.mask else end
        owned = [t for s in self.context.plan.owned(0) for t in range(s.start, s.end) if t >= first]
        return {*owned, *self.numbers[max(0, first - end) : row + 1]}


def _at(address: int) -> ctypes.c_double:
    return ctypes.c_double.from_address(address)


def _write_and_read(inputs: StepInputs, rows: range, kind: LayerKind, numbers: list[int]) -> list[set[float]]:
    """Of each row of a sequence what it sees, in all layers of a kind, once each has its number."""
    seen = []
    for layer in kind.layers:
        table = inputs.of_layers[layer]
        for row, number in zip(rows, numbers, strict=True):
            for i, sign in enumerate((1, -1)):
                _at(table.bases[row, 0, i].item() + 8 * table.slots[row].item()).value = sign * number
        for row in rows:
            values = []
            for (first, count), bases in zip(
                table.spans[row].tolist(), table.bases[row].tolist(), strict=True
            ):
                assert count <= table.most_keys
                for token in range(first, first + count):
                    key, value = (_at(base + 8 * token).value for base in bases)
                    assert key == -value
                    values.append(key)
            assert len(set(values)) == len(values)
            seen.append(set(values))
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_shown_what_they_see_while_tails_grow_forget_and_go_through_the_loop(seed):
    random, number = Random(seed), 1000
    encoded = [context(40), context(7)]
    followers = [Follower(encoded[0]), Follower(encoded[0]), Follower(encoded[1])]
    for _ in range(60):
        active = random.sample(followers, random.randint(1, 3))
        active.sort(key=lambda one: encoded.index(one.context))
        counts = [random.choices([1, 2, 17, 40], [8, 4, 3, 1])[0] for _ in active]
        inputs = StepInputs(
            LAYERS,
            [one.fed(count) for one, count in zip(active, counts, strict=True)],
            [0],
            CPU,
            size=(130, 2),
        )
        by_address = all(one.numbers for one in active) and max(counts) <= MOST_ROWS
        assert inputs.has_tables == by_address
        assert inputs.shape.num_rows == (130 if by_address else sum(counts))
        start = 0
        for one, count in zip(active, counts, strict=True):
            new, rows = list(range(number, number + count)), range(start, start + count)
            number, start = number + count, start + count
            if by_address:
                one.numbers += new
            else:
                one.append_by_loop(new)
            for kind in KINDS if by_address else ():
                expected = [one.expected(kind, len(one.numbers) - count + i) for i in range(count)]
                assert _write_and_read(inputs, rows, kind, new) == expected * len(kind.layers)
            if random.random() < 0.4:
                del one.numbers[len(one.numbers) - min(count, random.randint(0, MOST_PROPOSED_TOKENS)) :]
        for table in inputs.of_layers.values():
            assert (table.slots[start:] == -1).all() and (table.spans[start:] == 0).all()


def test_rows_on_a_rank_without_their_tail_see_the_context_and_are_put_nowhere():
    encoded = context(40, cp_rank=1)
    inputs = StepInputs(LAYERS, [FedSequence(encoded, None, 3, [5, 6])], [1], CPU, size=(2, 1))
    fields = inputs.fields
    assert fields.token_ids.tolist() == [5, 6] and fields.position_ids.tolist() == [43, 44]
    for layer, table in inputs.of_layers.items():
        assert table.slots.tolist() == [-1, -1]
        assert (table.spans[:, 0] == 0).all()
        kind = next(kind for kind in KINDS if layer in kind.layers)
        first = kind.mask.first_seen(43) if kind.mask else 40
        owned = sum(max(0, s.end - max(s.start, first)) for s in encoded.plan.owned(1))
        assert table.spans[0, :, 1].sum() == owned


def test_a_signature_tells_contexts_and_numbers_of_rows_and_nothing_that_a_refill_brings():
    encoded = [context(40), context(40)]
    one, two, other = (Follower(encoded[i]) for i in (0, 0, 1))
    for each in (one, two, other):
        each.append_by_loop([1])

    def signature(*counts: tuple[Follower, int], size: int = 8) -> object:
        return StepInputs(LAYERS, [each.fed(n) for each, n in counts], [0], CPU, size=(size, 1)).signature

    same = signature((one, 1), (two, 1))
    two.append_by_loop([1] * (6 * CHUNK_TOKENS))
    assert signature((two, 1), (one, 1)) == same and hash(signature((two, 1), (one, 1))) == hash(same)
    assert signature((one, 2)) == same  # as many rows attend to the context
    assert signature((one, 1), (other, 1)) != same
    assert signature((one, 1), (two, 1), size=4) != same
    assert signature((one, 40)) != same
    del two, one, each
    encoded.pop(0)
    gc.collect()
    assert signature((other, 1), (other, 1)) != same


def test_a_refill_brings_everything_that_is_new():
    one = Follower(context(40))
    one.append_by_loop([1])
    first = StepInputs(LAYERS, [one.fed(1)], [0], CPU, size=(2, 1))
    tables = first.of_layers
    one.append_by_loop([1] * CHUNK_TOKENS)
    second = StepInputs(LAYERS, [one.fed(1)], [0], CPU, size=(2, 1))
    assert not torch.equal(first.tensor, second.tensor)
    first.refill(second)
    for layer, table in second.of_layers.items():
        for found, expected in zip(tables[layer][:3], table[:3], strict=True):
            assert torch.equal(found, expected) and found.data_ptr() % 16 == 0
