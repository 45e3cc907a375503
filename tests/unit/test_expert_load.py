"""How evenly experts are loaded: from the ranks' counts to /metrics."""

import threading
from time import sleep
from types import SimpleNamespace

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from megatron_star.engine import thread as thread_module
from megatron_star.engine.expert_load import ExpertLoad
from megatron_star.engine.thread import EngineThread
from megatron_star.server.metrics import ServerMetrics

STATS = dict.fromkeys(
    (
        "waiting",
        "running",
        "cached_contexts",
        "context_encodings",
        "proposed_tokens",
        "accepted_tokens",
        "kv_budget_bytes_per_rank",
    ),
    0,
)


def load_of(moe_layer_freq: list[int] | int = 1, ep_size: int = 2) -> ExpertLoad:
    """Of a model of three layers with four experts."""
    config = SimpleNamespace(
        num_layers=3,
        num_moe_experts=4,
        moe_layer_freq=moe_layer_freq,
        expert_model_parallel_size=ep_size,
    )
    return ExpertLoad.of_model(config)


class FakeEngine:
    """Ranks that have counted a row more for each expert of theirs in every step that asks."""

    is_storing = False

    def __init__(self, load: ExpertLoad | None, seconds: float = 0.0, idle: bool = True) -> None:
        """seconds: of a step. idle: before the first step; afterwards there is no work."""
        self.expert_load, self.seconds, self.num_readings = load, seconds, 0
        self.scheduler, self.stepping = SimpleNamespace(idle=idle), threading.Event()

    def calibrate(self) -> None:
        """Nothing."""

    def stats(self) -> dict:
        """Nothing goes on."""
        return STATS | {"kv_bytes_per_rank": [0], "kv_dtype": "auto", "context_store": {}}

    def step(self, *, read_expert_load: bool) -> None:
        """Takes its time."""
        self.scheduler.idle = True
        self.stepping.set()
        sleep(self.seconds)
        if read_expert_load:
            self.num_readings += 1
            self.expert_load = self.expert_load.read(self.expert_load.counted + 1)


@pytest.fixture
def started():
    """Starts engines, and stops them."""
    threads = []

    def start(engine: FakeEngine) -> EngineThread:
        threads.append(EngineThread(engine))
        threads[-1].start(lambda error: None)
        return threads[-1]

    yield start
    for thread in threads:
        thread.stop()


def values_of(engine: FakeEngine, *, each_expert: bool = False) -> dict[tuple[str, ...], float]:
    """Of /metrics, those on experts, by name and labels; of an engine that is not stepped."""
    metrics = ServerMetrics()
    thread = SimpleNamespace(stats=engine.stats, expert_load=lambda: engine.expert_load)
    metrics.watch(thread, each_expert=each_expert)
    return {
        (
            sample.name.removeprefix("megatron_star_expert_"),
            *map(sample.labels.get, sorted(sample.labels, reverse=True)),
        ): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if sample.name.startswith("megatron_star_expert_")
    }


def test_metrics_say_how_uneven_each_layer_is_lately_and_what_ranks_had_since_the_start():
    load = load_of([0, 1, 1]).read(torch.tensor([[9, 9, 9, 9], [1, 0, 0, 0]]))
    load = load.read(load.counted + torch.tensor([[6, 0, 2, 0], [1, 1, 1, 1]]))
    assert values_of(FakeEngine(load)) == {
        ("busiest_over_mean", "1"): 3.0,
        ("busiest_over_mean", "2"): 1.0,
        ("rank_busiest_over_mean", "1"): 1.5,
        ("rank_busiest_over_mean", "2"): 1.0,
        ("rank_tokens_total", "0"): 18 + 1 + 6 + 2,
        ("rank_tokens_total", "1"): 18 + 2 + 2,
    }


def test_each_expert_is_counted_where_that_is_asked_for():
    load = load_of([0, 0, 1]).read(torch.tensor([[3, 0, 7, 1]]))
    counts = {
        key[1:]: value for key, value in values_of(FakeEngine(load), each_expert=True).items() if key[2:]
    }
    assert counts == {("2", "0"): 3, ("2", "1"): 0, ("2", "2"): 7, ("2", "3"): 1}


def test_a_model_without_experts_has_no_metrics_on_them():
    config = SimpleNamespace(num_layers=3, num_moe_experts=None, moe_layer_freq=1)
    assert ExpertLoad.of_model(config) is None
    assert values_of(FakeEngine(None), each_expert=True) == {}


def test_before_any_token_layers_are_even_and_without_new_ones_they_are_as_they_were():
    load = load_of()
    assert load.busiest_expert == load.busiest_rank == [1.0] * 3
    load = load.read(torch.tensor([[4, 0, 0, 0]] * 3))
    assert load.read(load.counted).busiest_expert == [4.0] * 3
    assert load.from_now_on().busiest_expert == [1.0] * 3
    assert load.from_now_on().read(load.counted + 1).tokens_of_ranks == [6, 6]


def test_whoever_asks_gets_a_new_reading_also_from_an_engine_without_work(started, monkeypatch):
    monkeypatch.setattr(thread_module, "HEARTBEAT_SECONDS", 20.0)
    engine = FakeEngine(load_of())
    thread = started(engine)
    assert [thread.expert_load().tokens_of_ranks for _ in range(3)] == [[6, 6], [12, 12], [18, 18]]
    assert engine.num_readings == 3


def test_whoever_asks_during_the_last_step_gets_a_new_reading(started, monkeypatch):
    monkeypatch.setattr(thread_module, "HEARTBEAT_SECONDS", 20.0)
    monkeypatch.setattr(thread_module, "SECONDS_FOR_A_READING", 10.0)
    engine = FakeEngine(load_of(), seconds=0.3, idle=False)
    thread = started(engine)
    engine.stepping.wait(10)
    assert thread.expert_load().tokens_of_ranks == [6, 6]


def test_whoever_asks_during_a_long_step_gets_what_there_was_before(started, monkeypatch):
    monkeypatch.setattr(thread_module, "SECONDS_FOR_A_READING", 0.05)
    thread = started(FakeEngine(load_of(), seconds=0.5))
    assert thread.expert_load().tokens_of_ranks == [0, 0]


def ask_at_once(thread: EngineThread, num_askers: int) -> None:
    """All get an answer soon."""
    askers = [threading.Thread(target=thread.expert_load, daemon=True) for _ in range(num_askers)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(20)
    assert not any(asker.is_alive() for asker in askers)


def test_many_who_ask_at_once_are_answered_and_none_waits_for_an_engine_that_has_stopped(
    started, monkeypatch
):
    monkeypatch.setattr(thread_module, "SECONDS_FOR_A_READING", 100.0)
    engine = FakeEngine(load_of())
    thread = started(engine)
    ask_at_once(thread, 20)
    assert 1 <= engine.num_readings <= 20
    thread.stop()
    ask_at_once(thread, 1)
    assert thread.expert_load() is engine.expert_load


def test_an_engine_of_a_model_without_experts_is_never_asked(started):
    engine = FakeEngine(None)
    assert started(engine).expert_load() is None
    assert engine.num_readings == 0
