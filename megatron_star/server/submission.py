"""Makes an `Ask` into requests of the engine's, checks them, and hands them over."""

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from megatron_star.config import FieldError, StarConfig
from megatron_star.engine.answer import Answer
from megatron_star.engine.grammar import Grammar
from megatron_star.engine.request import StarRequest
from megatron_star.engine.thread import EngineThread
from megatron_star.planning.mask import most_sources
from megatron_star.planning.sizes import length_for_sizes, with_sizes
from megatron_star.server.ask import Ask, Content, Generation
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.errors import RequestError
from megatron_star.server.key_usage import KeyUsage, tokens_in_flight
from megatron_star.server.keys import KeyLimits
from megatron_star.server.settings import ServerSettings
from megatron_star.server.star_options import StarOptions
from megatron_star.text.bad_words import bad_word_tokens
from megatron_star.text.end_tokens import end_tokens, stop_tokens
from megatron_star.text.prompt import SplitPrompt, truncated

MOST_BLOCK_SOURCES = 1 << 15
MOST_PROMPT_LOGPROBS = 1 << 21


class Submitted(NamedTuple):
    """See `Batch`."""

    splits: list[SplitPrompt]
    answers: list[Answer]
    echoes: list[str]


class Submission:
    """Tokenizes, which takes a while for long prompts: its method belongs into a thread."""

    def __init__(self, engine: EngineThread, settings: ServerSettings, usage: KeyUsage) -> None:
        """usage: what each key has in flight."""
        self.engine, self.settings, self._usage = engine, settings, usage
        self.tokenizer, self.end_tokens = engine.tokenizer, end_tokens(engine.tokenizer)
        self.splitter = PromptSplitter(
            engine.tokenizer,
            settings.num_query_tokens,
            settings.separator,
            max_tokens=engine.max_sequence_length,
        )

    def submit(self, ask: Ask, limits: KeyLimits, grammar: Grammar | None) -> Submitted:
        """All that is asked, or nothing of it.

        Raises:
            ValueError, RequestError: a prompt cannot be answered.
        """
        star = self._star_of(ask)
        common = {
            "speculate": ask.star.speculate or self.settings.speculate,
            "tenant": limits.name,
            "share": limits.share,
            "cache_salt": ask.cache_salt,
            "priority": ask.priority,
            "grammar": grammar,
        }
        splits = [self._truncated(prompt.split(self.splitter, ask.star), ask) for prompt in ask.prompts]
        echoes = [self._as_text(content) for content in ask.echoed]
        for split in splits:
            self._check_context(split, star)
            self._check_prompt_logprobs(split, ask.generation.prompt_logprobs)
        generation = self._with_bad_words(ask.generation)
        requests: list[StarRequest] = []
        for index, split in enumerate(split for split in splits for _ in range(ask.num_choices)):
            request = self._request(split, star, generation, index)
            # Only the first answer to a prompt says what was done for it.
            is_first = index % ask.num_choices == 0
            common["attention_map"] = bool(ask.star.attention_map) and is_first
            common["prompt_logprobs"] = ask.generation.prompt_logprobs if is_first else None
            requests.append(replace(request, **common))
        return Submitted(splits, self._submit_all(requests, limits), echoes)

    def _submit_all(self, requests: list[StarRequest], limits: KeyLimits) -> list[Answer]:
        """All of them, or none: then their tokens are not in flight either."""
        answers: list[Answer] = []
        count = sum(map(tokens_in_flight, requests))
        self._usage.take_tokens(limits, count)
        try:
            with _cancelled_on_error(answers):
                answers += map(self.engine.submit, requests)
        except BaseException:
            self._usage.give_back(limits.name, tokens=count)
            raise
        return answers

    def _truncated(self, split: SplitPrompt, ask: Ask) -> SplitPrompt:
        most = ask.truncate_prompt
        if most == -1:
            most = max(1, self.engine.max_sequence_length - ask.generation.num_tokens)
        return split if most is None else truncated(split, most)

    def _with_bad_words(self, generation: Generation) -> Generation:
        """As tokens, among the rules."""
        rules, words = generation.rules, bad_word_tokens(self.tokenizer, generation.bad_words)
        return replace(generation, rules=replace(rules, bad_words=rules.bad_words + words))

    def _as_text(self, content: Content) -> str:
        if isinstance(content, str):
            return content
        return self.tokenizer.decode(content, skip_special_tokens=False)

    def _request(
        self, split: SplitPrompt, star: StarConfig, generation: Generation, index: int
    ) -> StarRequest:
        seed = secrets.randbits(62) if generation.seed is None else generation.seed + index
        ends = self.end_tokens if generation.end_tokens is None else generation.end_tokens
        room = self.engine.most_generated(len(split.context_tokens) + len(split.query_tokens))
        return StarRequest(
            context_tokens=split.context_tokens,
            query_tokens=split.query_tokens,
            star=star,
            sampling=generation.sampling(room),
            end_tokens=(*ends, *generation.more_end_tokens, *stop_tokens(self.tokenizer, generation.stop)),
            min_tokens=generation.min_tokens,
            rules=generation.rules,
            num_top_logprobs=generation.num_top_logprobs,
            include_stop_text=generation.include_stop_text,
            skip_special_tokens=generation.skip_special_tokens,
            hidden_tokens=generation.hidden_tokens,
            seed=seed,
            turn_edges=split.turn_edges,
        )

    def _check_prompt_logprobs(self, split: SplitPrompt, num_top: int | None) -> None:
        num_tokens = len(split.context_tokens) + len(split.query_tokens)
        if num_top is not None and num_tokens * (1 + num_top) > MOST_PROMPT_LOGPROBS:
            raise RequestError(
                400,
                f"log-probabilities of {num_tokens} prompt tokens, each with {num_top} others, are more "
                f"than the {MOST_PROMPT_LOGPROBS} of one answer",
                "prompt_logprobs",
            )

    def _check_context(self, split: SplitPrompt, star: StarConfig) -> None:
        num_tokens, most = len(split.context_tokens), self.settings.max_context_tokens
        if most is not None and num_tokens > most:
            raise RequestError(
                400, f"the context has {num_tokens} tokens, but the limit is {most}", "context"
            )
        star = with_sizes(star, length_for_sizes(num_tokens, split.turn_edges))
        if most_sources(star, num_tokens) > MOST_BLOCK_SOURCES:
            raise RequestError(
                400,
                f"star.block_size is {star.block_size}: too small for {num_tokens} context tokens with "
                f"neighbor_blocks {star.neighbor_blocks} and passed_keys {star.passed_keys}",
                "star.block_size",
            )

    def _star_config(self, options: StarOptions) -> StarConfig:
        """The server's, with what the request sets.

        Raises:
            FieldError: the two do not go together.
        """
        try:
            return replace(self.settings.star, **options.encoding())
        except FieldError as error:
            raise FieldError(str(error), f"star.{error.field}") from error

    def _star_of(self, ask: Ask) -> StarConfig:
        """Log-probabilities of a prompt are those of the model itself, if the request names no mode."""
        star = self._star_config(ask.star)
        is_exact = ask.generation.prompt_logprobs is not None and ask.star.mode is None
        return replace(star, mode="exact") if is_exact else star


@contextmanager
def _cancelled_on_error(answers: list[Answer]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        cancel(answers)
        if isinstance(error, RuntimeError):
            raise RequestError(503, str(error)) from error
        raise


def cancel(answers: Iterable[Answer]) -> None:
    """End those that have not ended."""
    for answer in answers:
        if not answer.ended.is_set():
            answer.cancel()
