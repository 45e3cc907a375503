"""Steps whose attention to tails goes over addresses, beside the loop that is their twin, on each rank.

On a CPU the kernels run in Triton's interpreter: `TRITON_INTERPRET` is 1 in the environment of these ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from gpu_ranks import load
from random_models import VOCAB_SIZE
from torch import Tensor

from megatron_star.algorithm import recent_kv, tail
from megatron_star.algorithm.context_encoding import encode_wave
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel, tail_layers_of
from megatron_star.algorithm.step_inputs import StepInputs
from megatron_star.algorithm.token_generation import (
    NewTokens,
    Sequence,
    generate_step,
    run_packed,
    step_inputs,
)
from megatron_star.attention import stored_kv
from megatron_star.config import StarConfig
from megatron_star.planning import kv_memory
from megatron_star.planning.cost_model import token_costs
from megatron_star.planning.plan import ContextPlan

CHUNK_TOKENS = 20
Fed = dict[int, list[int]]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """KV lies in memory as on a GPU, where it is NaN until it is written, and tails grow often."""
    with ExitStack() as stack:
        for module in (stored_kv, recent_kv, tail):
            stack.enter_context(patch.object(module, "empty_kv", _tokens_first))
        stack.enter_context(patch.object(kv_memory, "TAIL_CHUNK_TOKENS", CHUNK_TOKENS))
        yield


def _tokens_first(num_tokens: int, like: Tensor) -> Tensor:
    return like.new_full((num_tokens, *like.shape[1:]), torch.nan)


def tokens(count: int) -> list[int]:
    """Random ones of the vocabulary of small models."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist()


CONTEXTS = [tokens(41), tokens(60)[41:], tokens(97)[60:]]
"""The second one extends the first, the third stands alone; of sequence i it is the one of number i % 3."""


def steps() -> list[tuple[Fed, dict[int, int]]]:
    """What sequences are fed, by their numbers, and how many tokens each forgets afterwards.

    Sequences begin in steps of their own, some tokens are guessed and forgotten, and tails outgrow buffers
    twice. A long query goes through the loop, in a step in which others have one token.
    """
    token = iter(tokens(4_000)[100:])

    def some(**sizes: int) -> Fed:
        return {int(i.removeprefix("s")): [next(token) for _ in range(size)] for i, size in sizes.items()}

    return [
        (some(s0=3, s1=1, s2=20), {}),
        (some(s0=1, s1=1, s2=1), {}),
        (some(s0=5, s1=17, s2=1), {0: 4, 1: 16}),
        (some(s0=1, s1=9, s3=1), {}),
        (some(s1=1, s0=1, s3=1, s2=2), {2: 1}),
        (some(s0=34, s3=1), {}),
        (some(s0=1, s1=1, s2=1, s3=1), {}),
        (some(s1=12), {}),
        (some(s2=9, s1=2), {2: 8}),
        (some(s0=1, s1=1, s2=1, s3=1), {}),
    ]


def by_addresses_and_by_loop(
    checkpoint: str, dtype: torch.dtype = torch.float32, compiled_rows: tuple[int, ...] = ()
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Logits of each step, by addresses and by the loop, and how many steps went over addresses."""
    with as_on_a_gpu():
        star_model = load(checkpoint, dtype, "auto", "local", compiled_rows)
        layers = tail_layers_of(star_model.model)
        found, count = _run(replace(star_model, tail_layers=layers))
        expected, _ = _run(replace(star_model, tail_layers=None))
    return [(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True)], count


def _run(star_model: StarModel) -> tuple[list[Tensor], int]:
    encoded = encoded_contexts(star_model)
    ranks, sequences, logits, seen = star_model.exchange.cp_size, {}, [], []
    kind = type(star_model)

    def spy(self: StarModel, inputs: StepInputs, run: object) -> Tensor:
        seen.append(inputs.has_tables)
        return original(self, inputs, run)

    original = kind.run_step
    with patch.object(kind, "run_step", spy):
        for fed, forgotten in steps():
            for i in fed:
                if i not in sequences:
                    sequences[i] = Sequence(encoded[i % 3], tail_rank=i % ranks)
            new = [(sequences[i], tokens, len(tokens)) for i, tokens in fed.items()]
            logits.append(generate_step(star_model, new))
            for i, num_tokens in forgotten.items():
                sequences[i].rewind(sequences[i].num_tail_tokens - num_tokens)
    return logits, sum(seen)


def encoded_contexts(star_model: StarModel) -> list[EncodedContext]:
    """Those of `CONTEXTS`."""
    first = _encode(star_model, CONTEXTS[0])
    return [first, _encode(star_model, CONTEXTS[0] + CONTEXTS[1], first), _encode(star_model, CONTEXTS[2])]


def _encode(
    star_model: StarModel, token_ids: list[int], parent: EncodedContext | None = None
) -> EncodedContext:
    exchange, costs = star_model.exchange, token_costs(star_model.model.config)
    star = StarConfig(mode="star", block_size=9)
    plan = ContextPlan.build(len(token_ids), exchange.cp_size, star, costs, parent and parent.plan)
    context = EncodedContext(plan, exchange.cp_rank, parent)
    for wave in plan.waves:
        encode_wave(star_model, token_ids, wave, context)
    return context


def recorded_and_run(checkpoint: str, num_sequences: int) -> list[tuple[Tensor, Tensor]]:
    """Logits of steps that a CUDA graph of an earlier one gives with their inputs, and of the steps as such.

    Between them tails outgrow their buffers. Nothing of a step waits for the device.
    """
    pairs = []
    with as_on_a_gpu():
        star_model = load(checkpoint, torch.float32, "auto", "local")
        encoded = encoded_contexts(star_model)
        sequences = [Sequence(encoded[i % 3], tail_rank=0) for i in range(num_sequences)]
        sequences.sort(key=lambda one: id(one.context))
        new = [NewTokens(one, [i + 1]) for i, one in enumerate(sequences)]
        rows = range(num_sequences)
        for _ in range(2):
            generate_step(star_model, new)
        recorded = step_inputs(star_model, new, rows)
        graph, logits = _recorded(lambda: run_packed(star_model, new, recorded))
        for step in range(2 * CHUNK_TOKENS + 1):
            inputs = step_inputs(star_model, new, rows)
            recorded.refill(inputs)
            graph.replay()
            found = logits.clone()
            torch.cuda.set_sync_debug_mode("error")
            expected = run_packed(star_model, new, inputs)
            torch.cuda.set_sync_debug_mode("default")
            if step % 9 == 0:
                pairs.append((found.cpu(), expected.cpu()))
            for one in sequences:
                one.num_tail_tokens += 1
    return pairs


def _recorded(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()
    return graph, logits
