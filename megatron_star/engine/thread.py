"""An engine that is stepped in a thread of its own, for programs that do other things meanwhile."""

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from megatron_star.engine.answer import Answer
from megatron_star.engine.cached_context import ContextKey
from megatron_star.engine.engine import SECONDS_OF_A_PAUSE, StarEngine
from megatron_star.engine.expert_load import ExpertLoad
from megatron_star.engine.request import StarRequest
from megatron_star.parallel.watch import RankWatch
from megatron_star.text.text_stream import Tokenizer

HEARTBEAT_SECONDS = 1.0
SECONDS_OF_SILENCE = 5.0
"""Of a rank that sends a beat every second."""
SECONDS_FOR_A_READING = 1.0
"""For which somebody who asks for the experts' load waits: a step may take longer."""
SECONDS_OF_A_STEP = 60.0
"""An idle turn takes a heartbeat, others are cut to the longest wait; this is for the slowest of CPUs."""


class EngineThread:
    """Steps an engine from `start` to `stop`. Any thread may call its methods, and none the engine's.

    The engine is stepped while there is work, and once a heartbeat while there is none: a command that says
    nothing tells the workers that the driver lives.
    """

    def __init__(self, engine: StarEngine, watch: RankWatch | None = None) -> None:
        """watch: of the ranks, for `trouble`."""
        self.engine, self._watch = engine, watch
        self._submitted: list[Answer] = []
        self._to_forget: list[ContextKey] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._load_is_asked_for = False
        self._last_step_at = monotonic()

    @property
    def tokenizer(self) -> Tokenizer:
        """The engine's."""
        return self.engine.tokenizer

    @property
    def max_sequence_length(self) -> int:
        """The engine's."""
        return self.engine.max_sequence_length

    @property
    def vocab_size(self) -> int:
        """The model's, without what it is padded with."""
        return self.engine.star_model.vocab_size

    def most_generated(self, num_prompt: int) -> int:
        """See `StarEngine.most_generated`."""
        return self.engine.most_generated(num_prompt)

    def start(self, on_failure: Callable[[Exception], None]) -> None:
        """Begin.

        Args:
            on_failure: called in the thread with what `step` raises; nothing is answered any more then.
        """
        self.engine.calibrate()
        self._last_step_at = monotonic()
        self._thread = threading.Thread(target=self._run, args=(on_failure,), name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Step no more; whoever made the engine may use it again, and then stops it."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        self._enqueue_submitted()

    def prepare(self, request: StarRequest) -> Answer:
        """See `StarEngine.prepare`."""
        return self.engine.prepare(request)

    def enqueue(self, answer: Answer) -> None:
        """Queue what was prepared, once; raises RuntimeError if the engine has stopped."""
        with self._changed:
            if self._stopping:
                raise RuntimeError("the engine has stopped")
            self._submitted.append(answer)
            self._changed.notify_all()

    def submit(self, request: StarRequest) -> Answer:
        """Prepare and queue a request; its answer streams from the result. Raises as these two do."""
        answer = self.prepare(request)
        self.enqueue(answer)
        return answer

    def num_encoded_tokens(self, key: ContextKey) -> int | None:
        """See `Scheduler.num_encoded_tokens`."""
        return self.engine.scheduler.num_encoded_tokens(key)

    def forget(self, key: ContextKey) -> None:
        """Soon, see `Scheduler.forget`."""
        with self._changed:
            self._to_forget.append(key)
            self._changed.notify_all()

    def stats(self) -> dict[str, Any]:
        """See `StarEngine.stats`."""
        stats = self.engine.stats()
        return stats | {"waiting": stats["waiting"] + len(self._submitted)}

    def expert_load(self) -> ExpertLoad | None:
        """How even the load of the experts is, read anew; None if the model has none.

        Ranks report it with a step. Where that takes more than `SECONDS_FOR_A_READING`, or there is none any
        more, it is what they reported before.
        """
        if self.engine.expert_load is None:
            return None
        with self._changed:
            self._load_is_asked_for = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._stopping or not self._load_is_asked_for, SECONDS_FOR_A_READING
            )
        return self.engine.expert_load

    def trouble(self) -> str | None:
        """Why nothing goes on at present, although it was started: a rank that is stopped, say."""
        silent = self._watch.silent_ranks(SECONDS_OF_SILENCE) if self._watch else []
        if silent:
            ranks = ", ".join(map(str, silent))
            return f"rank {ranks} has not been heard of for {SECONDS_OF_SILENCE:.0f} s: is it stopped?"
        seconds = monotonic() - self._last_step_at
        if self._thread and seconds > SECONDS_OF_A_STEP:
            return f"the ranks have not finished a step for {seconds:.0f} s"
        return None

    def _run(self, on_failure: Callable[[Exception], None]) -> None:
        try:
            while not self._wait_for_work():
                self._enqueue_submitted()
                self._step()
        except Exception as error:
            on_failure(error)

    def _step(self) -> None:
        asked = self._load_is_asked_for
        self.engine.step(read_expert_load=asked)
        self._last_step_at = monotonic()
        if asked:
            with self._changed:
                self._load_is_asked_for = False
                self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Until there is some, or for a heartbeat; returns whether to stop."""
        with self._changed:
            asked = self._submitted or self._to_forget or self._stopping or self._load_is_asked_for
            if self.engine.scheduler.idle and not asked:
                self._changed.wait(SECONDS_OF_A_PAUSE if self.engine.is_storing else HEARTBEAT_SECONDS)
            return self._stopping

    def _enqueue_submitted(self) -> None:
        with self._changed:
            submitted, self._submitted = self._submitted, []
            unwanted, self._to_forget = self._to_forget, []
        for key in unwanted:
            self.engine.scheduler.forget(key)
        for answer in submitted:
            self.engine.enqueue(answer)
