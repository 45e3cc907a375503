"""Keys and values are found where they were put, and nothing else is kept alive."""

import pytest
import torch

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.tail import Tail
from megatron_star.config import StarConfig
from megatron_star.planning.kv_memory import TAIL_CHUNK_TOKENS, spare_capacity
from megatron_star.planning.plan import ContextPlan, Source


def token_kv(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value [tokens, 1, 2, 4] that tell which token they are of."""
    key = torch.arange(start, end, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 2, 4)
    return key, -key


def test_sources_are_read_back_from_zigzag_pieces():
    plan = ContextPlan.build(80, 2, StarConfig(mode="exact"))
    context = EncodedContext(plan, 0)
    for segment in plan.owned(0):
        context.store(1, segment.start, *token_kv(segment.start, segment.end))
    for source in (Source(0, 20, 0), Source(60, 80, 0), Source(5, 9, 0), Source(79, 80, 0)):
        for read, stored in zip(context.read(1, source), token_kv(source.start, source.end), strict=True):
            assert torch.equal(read, stored)


def test_only_the_kept_tokens_are_held_in_memory():
    """A view of the larger tensor with the anchor's copy in it would hold twice as much."""
    plan = ContextPlan.build(64, 2, StarConfig(block_size=32, anchor="recompute"))
    context = EncodedContext(plan, 1)
    augmented = token_kv(0, 64)
    context.store(1, 32, augmented[0][32:], augmented[1][32:])
    held = sum(tensor.untyped_storage().nbytes() for tensor in next(context.held(1)))
    assert held == context.num_bytes == 2 * (32 + spare_capacity(32)) * 2 * 4 * 4


def encoded_context(num_tokens: int) -> EncodedContext:
    """Two layers of a context on one rank."""
    context = EncodedContext(ContextPlan.build(num_tokens, 1, StarConfig(mode="exact")), 0)
    for layer in (1, 2):
        context.store(layer, 0, *token_kv(0, num_tokens))
    return context


@pytest.mark.parametrize("num_context_tokens", [1, 400])
def test_a_tail_grows_and_keeps_what_it_had(num_context_tokens):
    """The second one begins in its context's spare capacity and is copied out of it."""
    context = encoded_context(num_context_tokens)
    tail = Tail(context)
    for start in range(0, 3 * TAIL_CHUNK_TOKENS, 20):
        key, value = tail.append(1, start, *token_kv(start, start + 20))
        assert torch.equal(key, token_kv(0, start + 20)[0])
        assert torch.equal(value, token_kv(0, start + 20)[1])
    assert tail.append(2, 0, *token_kv(0, 1))[0].size(0) == 1
    assert torch.equal(next(context.held(1))[0], token_kv(0, num_context_tokens)[0])


def test_a_tail_contiguous_with_its_context_is_held_with_it_and_takes_no_memory_of_its_own():
    context = encoded_context(400)
    tail = Tail(context)
    tail.append(1, 0, *token_kv(400, 420))
    assert tail.is_contiguous(1)
    [joined] = context.held(1, 20)
    for held, expected in zip(joined, token_kv(0, 420), strict=True):
        assert torch.equal(held, expected)
    assert len(next(context.held(1))[0]) == 400
    assert tail.num_bytes == 0
    tail.append(1, 20, *token_kv(420, 400 + spare_capacity(400) + 1))
    assert not tail.is_contiguous(1)
    assert tail.num_bytes > 0


def test_one_tail_at_a_time_is_contiguous_with_a_context():
    context = encoded_context(400)
    first, second = Tail(context), Tail(context)
    first.append(1, 0, *token_kv(0, 5))
    second.append(1, 0, *token_kv(5, 9))
    assert (first.is_contiguous(1), second.is_contiguous(1)) == (True, False)
    assert torch.equal(first.append(1, 5, *token_kv(5, 6))[0], token_kv(0, 6)[0])
    del first
    third = Tail(context)
    third.append(1, 0, *token_kv(0, 3))
    assert third.is_contiguous(1)


def test_the_rows_of_a_head_lie_side_by_side_in_a_cpus_memory():
    """Otherwise a new token's attention takes twice as long, or copies all keys and values."""
    plan = ContextPlan.build(64, 1, StarConfig(mode="exact"))
    context = EncodedContext(plan, 0)
    context.store(1, 0, *token_kv(0, 64))
    tail = Tail(context)
    appended = tail.append(1, 0, *token_kv(0, 5))
    for held in (*next(context.held(1)), *appended):
        assert held[:, 0, 0].is_contiguous()


def test_a_tail_forgets_its_end():
    context = encoded_context(800)
    tail = Tail(context)
    tail.append(1, 0, *token_kv(800, 820))
    expected = torch.cat((token_kv(800, 805)[0], token_kv(900, 1300)[0]))
    assert torch.equal(tail.append(1, 5, *token_kv(900, 1300))[0], expected)
