"""Whether an engine goes forward, told from its steps and from the ranks' beats."""

from types import SimpleNamespace

import pytest

from megatron_star.engine import thread as thread_module
from megatron_star.engine.thread import EngineThread
from megatron_star.server.state import ServerState


def engine(monkeypatch, silent: list[int], last_step_at: float, started: bool = True) -> EngineThread:
    """One whose last step was then, while 1010 is now."""
    watch = SimpleNamespace(silent_ranks=lambda seconds: silent)
    monkeypatch.setattr(thread_module, "monotonic", lambda: last_step_at)
    stopped_at_once = SimpleNamespace(calibrate=lambda: None, stop=lambda: None)
    thread = EngineThread(stopped_at_once, watch)
    if started:
        monkeypatch.setattr(thread, "_run", lambda on_failure: None)
        thread.start(lambda error: None)
    monkeypatch.setattr(thread_module, "monotonic", lambda: 1010.0)
    return thread


@pytest.mark.parametrize(
    ("silent", "last_step_at", "started", "trouble"),
    [
        ([], 1000.0, True, None),
        ([2, 3], 1000.0, True, "rank 2, 3 has not been heard of for 5 s"),
        ([], 900.0, True, "the ranks have not finished a step for 110 s"),
        ([], 900.0, False, None),
    ],
)
def test_what_does_not_go_on_is_named(monkeypatch, silent, last_step_at, started, trouble):
    state = ServerState(SimpleNamespace(engine=engine(monkeypatch, silent, last_step_at, started)))
    assert state.ready  # requests may wait for it
    assert state.name == ("stalled" if trouble else "ready")
    assert (state.trouble or "").startswith(trouble or "")
