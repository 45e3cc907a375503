"""The engine on simulated ranks with a simulated clock: how long a stream waits beside others' contexts."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_star.attention.stored_kv import AS_COMPUTED
from megatron_star.config import StarConfig
from megatron_star.engine import engine as engine_module
from megatron_star.engine import scheduled_request
from megatron_star.engine.command import Command
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.executor import planner_of
from megatron_star.engine.request import StarRequest
from megatron_star.engine.scheduled_request import Stage
from megatron_star.planning.pace import CPU_WAVE_TOKENS

MAX_WAIT = 1.0
DECODE_SECONDS, WAVE_SECONDS = 0.06, 0.02
SECONDS_PER_TOKEN = 0.001
"""As SmolLM2-135M on one core, or so."""
CONFIG = SimpleNamespace(
    num_layers=30,
    hidden_size=576,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    ffn_hidden_size=1536,
    gated_linear_unit=True,
    num_moe_experts=None,
    moe_router_topk=1,
    params_dtype=torch.float32,
    tensor_model_parallel_size=1,
)


class SimulatedRanks:
    """Takes as long as real ranks of such a speed would, on a machine that may be busy."""

    def __init__(self, engine: StarEngine) -> None:
        self.engine, self.now, self.slowness = engine, 100.0, 1.0
        self.contexts: dict[int, SimpleNamespace] = {}
        self.sequences: set[int] = set()
        self.seconds_per_cost = SECONDS_PER_TOKEN / engine.planner.costs.linear_per_token

    def execute(self, command: Command) -> torch.Tensor | None:
        self.sequences -= set(command.drop_sequences)
        self.sequences |= {sequence for sequence, *_ in command.open_sequences}
        if command.open_context:
            opened = command.open_context
            base = self.contexts[opened.parent[0]].plan.prefix(opened.parent[1]) if opened.parent else None
            plan = self.engine.planner.of_turns(opened.edges, opened.star, base)
            self.contexts[opened.context_id] = SimpleNamespace(plan=plan)
        seconds = 0.0
        if command.encode_wave:
            index, wave = command.encode_wave
            cost = self.contexts[index].plan.wave_cost(wave, self.engine.planner.costs)
            seconds += WAVE_SECONDS + cost * self.seconds_per_cost
        num_tokens = sum(len(fed.token_ids) for fed in command.feed)
        seconds += DECODE_SECONDS + num_tokens * SECONDS_PER_TOKEN if num_tokens else 0.0
        self.now += self.slowness * seconds
        return torch.zeros(sum(fed.num_logits for fed in command.feed), 100) if command.feed else None


@pytest.fixture
def engine(monkeypatch):
    star_model = SimpleNamespace(
        model=SimpleNamespace(config=CONFIG),
        exchange=SimpleNamespace(cp_size=2),
        device=torch.device("cpu"),
        vocab_size=100,
        kv_format=AS_COMPUTED,
    )
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "x" * len(tokens))
    engine = StarEngine(
        star_model,
        tokenizer,
        None,
        max_sequence_length=1 << 16,
        budget_bytes_per_rank=1 << 40,
        max_wait_seconds=MAX_WAIT,
    )
    engine.executor = SimulatedRanks(engine)
    monkeypatch.setattr(engine_module, "monotonic", lambda: engine.executor.now)
    monkeypatch.setattr(engine_module, "broadcast_json", lambda *_: None)
    engine.calibrate()
    return engine


def request(num_context: int, num_query: int, num_generated: int, first: int = 0) -> StarRequest:
    return StarRequest(
        context_tokens=[first % 100] * num_context,
        query_tokens=[2] * num_query,
        star=StarConfig(block_size=4096),
        sampling=SamplingParams(num_tokens_to_generate=num_generated, top_k=1),
    )


def test_a_planner_of_a_model_knows_its_ranks_its_device_and_the_longest_wait(engine):
    planner = engine.planner
    assert (planner.cp_size, planner.pace.largest_wave_tokens) == (2, CPU_WAVE_TOKENS)
    assert planner.pace.max_wait_seconds == MAX_WAIT
    assert planner_of(engine.star_model).plan(9000, StarConfig()).star.wave_tokens == CPU_WAVE_TOKENS


def gaps_beside(engine: StarEngine, others: list[StarRequest], slowness: float = 1.0) -> list[list[float]]:
    """Seconds between the tokens of a stream, while the others' first context is encoded, and from then on.

    slowness: of the machine, from when the others come.
    """
    stream = engine.submit(request(10, 5, 10_000))
    while len(stream.tokens) < 5:
        engine.step()
    answers = [engine.submit(other) for other in others]
    engine.executor.slowness, last = slowness, engine.executor.now
    gaps: list[list[float]] = [[], []]
    while not all(answer.ended.is_set() for answer in answers):
        num_tokens, first_is_encoded = len(stream.tokens), answers[0]._encoded_at > 0
        engine.step()
        if len(stream.tokens) > num_tokens:
            gaps[first_is_encoded].append(engine.executor.now - last)
            last = engine.executor.now
    return gaps


@pytest.mark.parametrize("turn_edges", [(), (40, 60)])
def test_what_was_prepared_is_queued_as_it_is_planned_and_hashed_once(engine, monkeypatch, turn_edges):
    asked = replace(request(100, 5, 3), turn_edges=turn_edges)
    planned, hashed = Mock(wraps=engine.planner.plan), Mock(wraps=scheduled_request.context_keys)
    monkeypatch.setattr(engine.planner, "plan", planned)
    monkeypatch.setattr(scheduled_request, "context_keys", hashed)
    answer = engine.prepare(asked)
    assert (answer.stage, engine.stats()["waiting"]) == (Stage.PREPARED, 0)
    engine.enqueue(answer)
    assert answer.stage == Stage.WAITING
    while not answer.ended.is_set():
        engine.step()
    assert len(answer.result().tokens) == 3 and answer.stage == Stage.ENDED
    assert (planned.call_count, hashed.call_count) == (1, 1)


@pytest.mark.parametrize(
    "when", [Stage.PREPARED, Stage.WAITING, Stage.ENCODING, Stage.READING, Stage.ANSWERING]
)
def test_a_request_that_is_cancelled_ends_once_and_leaves_nothing_at_whatever_stage_it_is(engine, when):
    answer = engine.prepare(request(3000, 2000, 50))
    others = [engine.submit(request(10, 5, 10_000))]  # so that the query is read in parts
    while len(others[0].tokens) < 3:
        engine.step()
    if when > Stage.PREPARED:
        engine.enqueue(answer)
    while answer.stage < when:
        engine.step()
    assert answer.stage == when
    answer.cancel()
    if when == Stage.PREPARED:
        engine.enqueue(answer)
    engine.step()
    assert answer.result(0).finish_reason == "cancelled" and answer.stage == Stage.ENDED
    answer.cancel()
    others[0].cancel()
    engine.step()
    engine.scheduler.drop_unused_contexts()
    engine.step()
    assert engine.executor.sequences == set()
    assert (
        engine.stats()["running"]
        == engine.stats()["waiting"]
        == sum(engine.stats()["kv_bytes_per_rank"])
        == 0
    )


FRESH_CONTEXTS = [request(8192, 256, 4, first) for first in range(6)]
LONG_QUERIES = [request(100, 2000, 4, first) for first in range(10)]
BOTH = FRESH_CONTEXTS + LONG_QUERIES


@pytest.mark.parametrize("others", [FRESH_CONTEXTS, LONG_QUERIES, BOTH], ids=range(3))
def test_a_stream_waits_no_longer_than_it_may_beside_others_contexts_and_queries(engine, others):
    first, rest = gaps_beside(engine, others)
    assert len(first + rest) > 20
    assert max(first + rest) <= MAX_WAIT


@pytest.mark.parametrize("others", [FRESH_CONTEXTS, BOTH], ids=range(2))
@pytest.mark.parametrize("slowness", [2.0, 4.0])
def test_on_a_machine_that_becomes_slower_contexts_get_shorter_waves_though_let_in_before(
    engine, others, slowness
):
    """The one that is being encoded keeps its waves."""
    first, rest = gaps_beside(engine, others, slowness)
    assert len(rest) > 20
    assert max(rest) <= MAX_WAIT


def test_without_anybody_who_waits_a_query_is_fed_as_fast_as_can_be(engine):
    answer = engine.submit(request(100, 1024, 1))
    num_steps = 0
    while not answer.ended.is_set():
        engine.step()
        num_steps += 1
    assert num_steps <= 4


def test_each_turn_of_a_chat_is_encoded_in_waves_that_are_short_enough(engine):
    chat = replace(request(8192, 64, 2), turn_edges=(3000, 5000))
    first, rest = gaps_beside(engine, [chat, *FRESH_CONTEXTS[1:3]])
    assert max(first + rest) <= MAX_WAIT
