"""The answers to one HTTP request: a bridge from the engine's threads to asyncio."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from itertools import batched
from time import monotonic
from typing import NamedTuple

from megatron_star.engine.answer import Answer, NewToken
from megatron_star.engine.request import StarResult
from megatron_star.server.errors import RequestError
from megatron_star.text.prompt import SplitPrompt

SECONDS_BETWEEN_PROGRESS = 1.0
SECONDS_BETWEEN_LOG_LINES = 5.0
log = logging.getLogger("megatron_star.server")


class EncodingProgress(NamedTuple):
    """Context tokens of a batch that are encoded by now."""

    num_encoded: int
    num_tokens: int


Event = tuple[int, NewToken | StarResult] | EncodingProgress


class Batch:
    """The answers to one HTTP request, in its order: `num_choices` to each prompt.

    Attributes:
        splits: for each prompt.
        echoes: the prompts' texts, if the answers repeat them.
        excerpts: of the answers that have an attention map, by their index: see `attention_report`.
        refusal: why `events` raised, if it did.
    """

    def __init__(
        self,
        splits: list[SplitPrompt],
        answers: list[Answer],
        echoes: Sequence[str] = (),
        *,
        num_best: int | None = None,
    ) -> None:
        """num_best: see `Ask`."""
        self.num_best = num_best
        self.splits, self.answers, self.echoes = splits, answers, echoes
        self.results: list[StarResult | None] = [None] * len(answers)
        self.excerpts: dict[int, list[str]] = {}
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
                    self.refusal = RequestError(400 if event.is_refused else 500, event.error)
                if self.refusal:
                    raise self.refusal
            yield index, event

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return len(self.answers) // len(self.splits)

    @property
    def num_shown(self) -> int:
        """Of them, those that are given to whoever asked."""
        return self.num_best or self.num_choices

    def shown(self) -> list[Answer]:
        """Of answers that have ended, those that are given; the likeliest first, if some are not."""
        if self.num_best is None:
            return self.answers
        chosen = []
        for answers in batched(self.answers, self.num_choices):
            chosen += sorted(answers, key=lambda answer: -sum(answer.logprobs))[: self.num_shown]
        return chosen

    async def wait(self) -> None:
        """Until every result is there."""
        async for _ in self.events():
            pass

    def _progress(self) -> EncodingProgress:
        progress = EncodingProgress(
            sum(answer.num_encoded_tokens for answer in self.answers),
            sum(len(answer.request.context_tokens) for answer in self.answers),
        )
        if monotonic() - self._logged_at > SECONDS_BETWEEN_LOG_LINES:
            self._logged_at = monotonic()
            log.info("progress", extra={"fields": progress._asdict()})
        return progress
