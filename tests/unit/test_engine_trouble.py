"""Whether an engine goes forward, told from its steps and from the ranks' beats."""

from types import SimpleNamespace

import pytest

from megatron_star.engine import engine as engine_module
from megatron_star.engine.engine import StarEngine
from megatron_star.server.state import ServerState


def engine(silent: list[int], last_step_at: float, *, started: bool = True) -> StarEngine:
    """One that was never built, since only these are asked."""
    bare = object.__new__(StarEngine)
    bare._watch = SimpleNamespace(silent_ranks=lambda seconds: silent)
    bare._last_step_at, bare._thread = last_step_at, started
    return bare


@pytest.mark.parametrize(
    ("bare", "trouble"),
    [
        (engine([], 1000.0), None),
        (engine([2, 3], 1000.0), "rank 2, 3 has not been heard of for 5 s"),
        (engine([], 900.0), "the ranks have not finished a step for 110 s"),
        (engine([], 900.0, started=False), None),
    ],
)
def test_what_does_not_go_on_is_named(monkeypatch, bare, trouble):
    monkeypatch.setattr(engine_module, "monotonic", lambda: 1010.0)
    state = ServerState(SimpleNamespace(engine=bare))
    assert state.ready  # requests may wait for it
    assert state.name == ("stalled" if trouble else "ready")
    assert (state.trouble or "").startswith(trouble or "")
