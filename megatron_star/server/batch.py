"""The answers to one HTTP request: a bridge from the engine's threads to asyncio."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

from megatron_star.engine.answer import Answer, NewToken
from megatron_star.engine.request import StarResult
from megatron_star.server.errors import RequestError
from megatron_star.text.prompt import SplitPrompt

SECONDS_BETWEEN_PROGRESS = 1.0
SECONDS_BETWEEN_LOG_LINES = 5.0
log = logging.getLogger("megatron_star.server")


class Progress(NamedTuple):
    """Context tokens of a batch that are encoded by now."""

    num_encoded: int
    num_tokens: int


Event = tuple[int, NewToken | StarResult] | Progress


class Batch:
    """The answers to one HTTP request, in its order: `num_choices` to each prompt.

    Attributes:
        refusal: why `events` raised, if it did.
    """

    def __init__(self, splits: list[SplitPrompt], answers: list[Answer]) -> None:
        self.splits, self.answers = splits, answers
        self.results: list[StarResult | None] = [None] * len(answers)
        self.refusal: RequestError | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, NewToken | StarResult]] = asyncio.Queue()
        self._logged_at = monotonic()

    def post(self, index: int, event: NewToken | StarResult) -> None:
        """Hand an event over to asyncio; from any thread."""
        with suppress(RuntimeError):  # the loop is gone, and so is whoever asked
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    async def events(self) -> AsyncIterator[Event]:
        """Tokens and results of all answers as they come, and progress while contexts are encoded.

        Raises:
            RequestError: the server stops before an answer has ended, or one ends with an error.
        """
        while None in self.results:
            try:
                index, event = await asyncio.wait_for(self._queue.get(), SECONDS_BETWEEN_PROGRESS)
            except TimeoutError:
                if not any(answer.tokens for answer in self.answers):
                    yield self._progress()
                continue
            if isinstance(event, StarResult):
                self.results[index] = event
                if event.finish_reason == "cancelled":
                    self.refusal = RequestError(
                        503, "the server stops, and the time to finish requests is over"
                    )
                if event.error:
                    self.refusal = RequestError(500, event.error)
                if self.refusal:
                    raise self.refusal
            yield index, event

    async def wait(self) -> None:
        """Until every result is there."""
        async for _ in self.events():
            pass

    def _progress(self) -> Progress:
        progress = Progress(
            sum(answer.num_encoded_tokens for answer in self.answers),
            sum(len(answer.request.context_tokens) for answer in self.answers),
        )
        if monotonic() - self._logged_at > SECONDS_BETWEEN_LOG_LINES:
            self._logged_at = monotonic()
            log.info("progress", extra={"fields": progress._asdict()})
        return progress
