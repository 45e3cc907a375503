"""From prompts to answers: admission, tokenization and submission."""

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.inference.sampling_params import SamplingParams

from megatron_star.config import StarConfig
from megatron_star.engine.answer import Answer
from megatron_star.engine.request import StarRequest
from megatron_star.engine.thread import EngineThread
from megatron_star.server.batch import Batch
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.errors import RequestError
from megatron_star.server.metrics import ServerMetrics
from megatron_star.server.settings import ServerSettings
from megatron_star.server.star_options import StarOptions
from megatron_star.text.end_tokens import end_tokens, stop_tokens
from megatron_star.text.prompt import SplitPrompt
from megatron_star.text.token_bytes import TokenBytes

SMALLEST_TEMPERATURE = 1e-3
"""Below it, sampling is greedy: logits divided by less would overflow."""
MOST_BLOCK_SOURCES = 1 << 15
TOKENIZER_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How tokens are chosen; the defaults of OpenAI's and Megatron's servers are the routes' business.

    Attributes:
        cut_to_room: nobody asked for so many tokens: fewer, where the model's limit leaves fewer.
        end_tokens: that end an answer; None are those of the model.
        more_end_tokens: in addition.
    """

    num_tokens: int
    cut_to_room: bool = False
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    stop: tuple[str, ...] = ()
    end_tokens: tuple[int, ...] | None = None
    more_end_tokens: tuple[int, ...] = ()
    seed: int | None = None

    def sampling(self, room: int) -> SamplingParams:
        """Megatron's parameters, where there is room for so many tokens; top_p of 1 and 0 are off."""
        num_tokens = max(self.num_tokens, self.min_tokens) if self.cut_to_room else self.num_tokens
        return SamplingParams(
            temperature=self.temperature if self.temperature >= SMALLEST_TEMPERATURE else 0.0,
            top_k=self.top_k,
            top_p=float(self.top_p) if self.top_p < 1.0 else 0.0,
            num_tokens_to_generate=min(num_tokens, max(1, room)) if self.cut_to_room else num_tokens,
            stop_words=list(self.stop) or None,
        )


Build = Callable[[PromptSplitter], list[SplitPrompt]]


class CompletionService:
    """Admits, tokenizes and submits; knows what may still come in."""

    def __init__(self, engine: EngineThread, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.tokenizer = engine.tokenizer
        self.token_bytes = TokenBytes(engine.tokenizer)
        self.end_tokens = end_tokens(engine.tokenizer)
        self.splitter = PromptSplitter(
            engine.tokenizer,
            settings.num_query_tokens,
            settings.separator,
            max_tokens=engine.max_sequence_length,
        )
        self._num_sequences = 0
        self._answers: set[Answer] = set()
        self._lock = threading.Lock()
        self._tokenizers = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")
        self._waiters = ThreadPoolExecutor(settings.max_sequences, "answer")
        metrics.watch(engine)

    @asynccontextmanager
    async def batch(
        self,
        build: Build,
        options: StarOptions,
        generation: Generation,
        *,
        num_prompts: int,
        num_choices: int = 1,
    ) -> AsyncIterator[Batch]:
        """Submit `num_choices` requests for each prompt of `build`; what has not ended at exit is cancelled.

        Raises:
            RequestError: a request cannot be answered; none is then left running.
        """
        self._reserve(num_prompts * num_choices)
        prepare = asyncio.get_running_loop().run_in_executor(
            self._tokenizers, self._prepare, build, options, generation, num_choices
        )
        try:
            splits, answers = await asyncio.shield(prepare)
        except BaseException as error:
            prepare.add_done_callback(lambda future: self._abandon(future, num_prompts * num_choices))
            if isinstance(error, ValueError):
                raise RequestError(400, str(error), getattr(error, "field", None)) from error
            raise
        batch = Batch(splits, answers)
        with self._lock:
            self._answers.update(answers)
        for index, answer in enumerate(answers):
            self._waiters.submit(self._follow, batch, index, answer)
        try:
            yield batch
        finally:
            self.cancel(answers)

    def cancel(self, answers: list[Answer]) -> None:
        """End those that have not ended."""
        for answer in answers:
            if not answer.ended.is_set():
                answer.cancel()

    def cancel_all(self) -> None:
        """End everything that runs or waits."""
        with self._lock:
            answers = list(self._answers)
        self.cancel(answers)

    async def in_tokenizer_thread[T](self, function: Callable[..., T], *args: Any) -> T:
        """What `function` returns; for work that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, function, *args)

    def star_config(self, options: StarOptions) -> StarConfig:
        """The server's, with what the request sets."""
        return replace(self.settings.star, **options.encoding())

    def _reserve(self, count: int) -> None:
        most = self.settings.max_sequences
        if count > most:
            raise RequestError(400, f"{count} prompts times n are more than the {most} that fit here")
        with self._lock:
            if self._num_sequences + count > most:
                raise RequestError(429, f"{self._num_sequences} of {most} places are taken: try again later")
            self._num_sequences += count

    def _release(self, count: int) -> None:
        with self._lock:
            self._num_sequences -= count

    def _abandon(self, prepared: asyncio.Future, count: int) -> None:
        """Whoever asked is gone, or the request was refused."""
        if not prepared.cancelled() and prepared.exception() is None:
            self.cancel(prepared.result()[1])
        self._release(count)

    def _prepare(
        self, build: Build, options: StarOptions, generation: Generation, num_choices: int
    ) -> tuple[list[SplitPrompt], list[Answer]]:
        star = self.star_config(options)
        splits = build(self.splitter)
        for split in splits:
            self._check_context(len(split.context_tokens), star)
        answers: list[Answer] = []
        with self._cancelled_on_error(answers):
            for index, split in enumerate(split for split in splits for _ in range(num_choices)):
                answers.append(self.engine.submit(self._request(split, star, generation, index)))
        return splits, answers

    @contextmanager
    def _cancelled_on_error(self, answers: list[Answer]) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.cancel(answers)
            if isinstance(error, RuntimeError):
                raise RequestError(503, str(error)) from error
            raise

    def _request(
        self, split: SplitPrompt, star: StarConfig, generation: Generation, index: int
    ) -> StarRequest:
        seed = secrets.randbits(62) if generation.seed is None else generation.seed + index
        ends = self.end_tokens if generation.end_tokens is None else generation.end_tokens
        room = self.engine.max_sequence_length - len(split.context_tokens) - len(split.query_tokens)
        return StarRequest(
            context_tokens=split.context_tokens,
            query_tokens=split.query_tokens,
            star=star,
            sampling=generation.sampling(room),
            end_tokens=(*ends, *generation.more_end_tokens, *stop_tokens(self.tokenizer, generation.stop)),
            min_tokens=generation.min_tokens,
            seed=seed,
            turn_edges=split.turn_edges,
        )

    def _check_context(self, num_tokens: int, star: StarConfig) -> None:
        most = self.settings.max_context_tokens
        if most is not None and num_tokens > most:
            raise RequestError(
                400, f"the context has {num_tokens} tokens, but the limit is {most}", "context"
            )
        num_blocks = -(-num_tokens // star.block_size)
        if (
            star.mode != "exact"
            and num_blocks * (1 + min(star.neighbor_blocks, num_blocks)) > MOST_BLOCK_SOURCES
        ):
            raise RequestError(
                400,
                f"star.block_size is {star.block_size}: too small for {num_tokens} context tokens with "
                f"neighbor_blocks {star.neighbor_blocks}",
                "star.block_size",
            )

    def _follow(self, batch: Batch, index: int, answer: Answer) -> None:
        """In a thread of its own: the answer's events, then its result."""
        for token in answer:
            batch.post(index, token)
        result = answer.result()
        with self._lock:
            self._answers.discard(answer)
        self._release(1)
        self.metrics.note_result(result)
        batch.post(index, result)
