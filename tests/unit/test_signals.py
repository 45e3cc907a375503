"""How the server counts the signals that end it."""

from megatron_star.programs import serve as server


def test_a_signal_and_its_echo_through_torchrun_count_once(monkeypatch):
    times = iter([100.0, 100.1, 101.5, 104.0])
    monkeypatch.setattr(server, "monotonic", lambda: next(times))
    monkeypatch.setattr(server.signal, "signal", lambda *_: None)
    signals = server._CountedSignals()
    for _ in range(3):
        signals._note()
    assert signals.count == 1 and signals.first.is_set()
    signals._note()
    assert signals.count == 2
