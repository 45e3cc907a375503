"""Which steps are captured and replayed, and when; what a graph computes is tested on a GPU."""

import gc
import logging
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_star.speed.graph_choice import graph_obstacle, takes_step_graphs
from megatron_star.speed.step_graph import (
    MOST_COUNTED,
    MOST_GRAPHS,
    MOST_ROWS,
    NUM_PLAIN,
    NUM_PLAIN_AGAIN,
    Recording,
    StepGraphs,
)


class Context:
    """Of which only its identity counts."""


class Inputs:
    """Of steps of some rows on contexts; `value` is what changes from one to the next."""

    def __init__(self, value: int, *contexts: Context, num_rows: int = 1, num_fed: int = 1) -> None:
        self.tensor, self.num_fed = torch.tensor([value]), num_fed
        self.runs = tuple((weakref.ref(context), num_rows) for context in contexts)
        self.has_tables, self.shape = True, SimpleNamespace(num_rows=num_rows)
        self.signature = num_rows, self.runs

    def refill(self, other: "Inputs") -> None:
        self.tensor.copy_(other.tensor)


class Graph:
    """Runs again what was captured, with the inputs that it then has."""

    def __init__(self, inputs: Inputs, logits: Tensor, number: int) -> None:
        self.inputs, self.logits, self.number = inputs, logits, number

    def replay(self) -> None:
        self.logits.copy_(10 * self.inputs.tensor)

    def pool(self) -> int:
        return self.number


class Recorder:
    """Stands in for CUDA."""

    def __init__(self) -> None:
        self.pools: list[object] = []
        self.failure: Exception | None = None

    def run(self, inputs: Inputs, run: Callable[[Any], Tensor]) -> Tensor:
        return run(inputs)

    def capture(self, inputs: Inputs, run: Callable[[Any], Tensor], pool: object) -> Recording:
        if self.failure:
            raise self.failure
        self.pools.append(pool)
        logits = torch.zeros(1, dtype=torch.int64)
        return Recording(Graph(inputs, logits, len(self.pools)), inputs, logits)


class Steps:
    """Runs steps, and notes which of them ran plain."""

    def __init__(self, **options: Any) -> None:
        self.recorder, self.plain = Recorder(), []
        self.graphs = StepGraphs(self.recorder, **options)

    def run(self, *args: Any, **options: Any) -> Tensor:
        return self.run_inputs(Inputs(*args, **options))

    def run_inputs(self, inputs: Inputs) -> Tensor:
        def run(own: Inputs) -> Tensor:
            self.plain.append(own.tensor.item())
            return 10 * own.tensor

        return self.graphs.run(inputs, run)

    def capture(self, *contexts: Context, **options: Any) -> None:
        before = self.graphs.num_captured
        while self.graphs.num_captured == before:
            self.run(0, *contexts, **options)
        self.plain.clear()


def test_after_a_few_steps_one_is_captured_and_later_ones_are_replayed_with_their_own_inputs():
    steps, context = Steps(), Context()
    logits = [steps.run(value, context).item() for value in range(NUM_PLAIN + 5)]
    assert logits == [10 * value for value in range(NUM_PLAIN + 5)]
    assert steps.plain == list(range(NUM_PLAIN + 1))  # the one that is captured runs, once
    assert (steps.graphs.num_captured, steps.graphs.num_replayed) == (1, 4)


def test_logits_stay_as_they_are_when_the_graph_is_replayed():
    steps, context = Steps(), Context()
    steps.capture(context)
    first = steps.run(1, context)
    steps.run(2, context)
    assert first.item() == 10


def test_a_graph_is_for_its_contexts_and_rows_alone():
    steps, context, other = Steps(), Context(), Context()
    steps.capture(context)
    for arguments in ((other,), (context, other), (other, context)):
        assert steps.run(1, *arguments) == 10
    assert steps.run(1, context, num_rows=2) == 10
    assert len(steps.plain) == 4 and steps.graphs.num_replayed == 0


@pytest.mark.parametrize(
    "change", [{"has_tables": False}, {"shape": SimpleNamespace(num_rows=MOST_ROWS + 1)}]
)
def test_a_step_of_many_rows_or_without_addresses_runs_plain(change):
    steps, context = Steps(), Context()
    for value in range(NUM_PLAIN + 3):
        inputs = Inputs(value, context)
        vars(inputs).update(change)
        steps.run_inputs(inputs)
    assert len(steps.plain) == NUM_PLAIN + 3 and not steps.recorder.pools


def test_the_least_recently_used_graph_makes_way_and_is_not_captured_again_at_once():
    steps, contexts = Steps(), [Context() for _ in range(MOST_GRAPHS + 1)]
    for context in contexts[:-1]:
        steps.capture(context)
    steps.run(1, contexts[0])
    steps.capture(contexts[-1])
    assert steps.run(1, contexts[0]) == 10 and not steps.plain
    for _ in range(NUM_PLAIN_AGAIN):
        steps.run(1, contexts[1])
    assert len(steps.plain) == NUM_PLAIN_AGAIN
    before = steps.graphs.num_captured
    steps.run(1, contexts[1])
    assert steps.graphs.num_captured == before + 1


def test_a_dropped_context_is_kept_alive_by_nothing_and_its_graphs_are_forgotten():
    steps, context, other = Steps(), Context(), Context()
    steps.capture(context, other)
    graph = weakref.ref(next(iter(steps.graphs._recordings.values())).graph)
    dropped = weakref.ref(context)
    del context
    assert dropped() is None
    steps.run(1, other)
    gc.collect()
    assert graph() is None and not steps.graphs._recordings


def test_a_new_context_is_never_taken_for_a_dropped_one():
    """Python may give it the same id."""
    steps = Steps()
    for _ in range(20):
        context = Context()
        steps.capture(context)
        del context
        assert steps.run(1, Context()) == 10
        assert steps.plain == [1] and steps.graphs.num_replayed == 0


def test_graphs_share_a_pool_as_long_as_there_is_one_that_has_it():
    steps, context = Steps(), Context()
    steps.capture(context)
    steps.capture(context, num_rows=2)
    del context
    steps.capture(Context())
    assert steps.recorder.pools == [None, 1, None]


def test_a_failed_capture_is_logged_once_by_its_reason_and_steps_run_plain_from_then_on(caplog):
    steps, context = Steps(), Context()
    steps.capture(context)
    steps.recorder.failure = RuntimeError("operation not permitted when stream is capturing\nmore")
    with caplog.at_level(logging.WARNING):
        for value in range(2 * NUM_PLAIN + 5):
            assert steps.run(value, context, num_rows=2) == 10 * value
            assert steps.run(value, context) == 10 * value
    [record] = caplog.records
    assert "RuntimeError: operation not permitted when stream is capturing" in record.getMessage()
    assert "more" not in record.getMessage()
    assert steps.graphs.error and steps.graphs.filled(3) == 3


def test_only_so_many_signatures_are_counted():
    steps, contexts = Steps(), [Context() for _ in range(2 * MOST_COUNTED)]
    for context in contexts:
        steps.run(1, context)
    assert len(steps.graphs._num_missing) == MOST_COUNTED


def test_steps_are_filled_up_to_powers_of_two():
    graphs = Steps().graphs
    assert [graphs.filled(n) for n in (0, 1, 2, 3, 4, 5, 33, MOST_ROWS, MOST_ROWS + 1)] == [
        *(0, 1, 2, 4, 4, 8, 64, MOST_ROWS, MOST_ROWS + 1)
    ]


def test_experts_get_no_fillers_and_their_graphs_know_how_many_rows_are_none():
    steps, context = Steps(fills_up=False), Context()
    assert steps.graphs.filled(3) == 3
    steps.capture(context, num_rows=4, num_fed=3)
    steps.run(1, context, num_rows=4, num_fed=4)
    assert steps.plain == [1]
    steps = Steps()
    steps.capture(context, num_rows=4, num_fed=3)
    steps.run(1, context, num_rows=4, num_fed=4)
    assert not steps.plain and steps.graphs.num_replayed == 1


def model(device: str = "cuda", *, ranks: int = 1, backend: str = "nccl", latent: bool = False) -> Any:
    group = SimpleNamespace(size=lambda: ranks, backend=backend)
    inner = torch.nn.Module()
    inner.config = SimpleNamespace(multi_latent_attention=latent)
    inner.pg_collection = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    exchange = SimpleNamespace(cp_group=group)
    return SimpleNamespace(
        device=torch.device(device),
        model=inner,
        exchange=exchange,
        experts=SimpleNamespace(exchange=exchange),
    )


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    """What a group's backend and a model's latents are, of the objects above."""
    module = "megatron_star.speed.graph_choice"
    monkeypatch.setattr(f"{module}.dist.get_backend", lambda group: group.backend)
    monkeypatch.setattr(f"{module}.latent_attention", lambda config: config.multi_latent_attention or None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (model("cpu"), "on a CPU"),
        (model(latent=True), "with latent attention"),
        (model(ranks=2, backend="gloo"), "where ranks talk over gloo, and not over NCCL"),
    ],
)
def test_where_steps_cannot_be_captured_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=f"cuda_graph is 'on', but steps cannot be captured .*{message}"):
        takes_step_graphs(wrong, "on")
    assert not takes_step_graphs(wrong, "auto") and not takes_step_graphs(wrong, "off")


def test_auto_captures_steps_of_one_rank_and_on_those_of_many_over_nccl():
    assert takes_step_graphs(model(), "auto") and takes_step_graphs(model(), "on")
    assert not takes_step_graphs(model(), "off")
    assert not takes_step_graphs(model(ranks=2), "auto") and takes_step_graphs(model(ranks=2), "on")
    assert graph_obstacle(model(ranks=2)) is None


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="cuda_graph is 'yes': it must be one of auto, on, off"):
        takes_step_graphs(model("cpu"), "yes")
