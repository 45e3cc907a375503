"""Answers of /v1/completions: text, with `echo` in front of it."""

from typing import Any

from megatron_star.engine.answer import Answer, NewToken
from megatron_star.engine.request import StarResult
from megatron_star.server.batch import Batch
from megatron_star.server.service import CompletionService
from megatron_star.server.wires.prompt_logprobs import PromptLogprobs
from megatron_star.server.wires.token_ids import token_bytes
from megatron_star.text.prompt import SplitPrompt
from megatron_star.text.text_stream import PROMPT_TOKENS, TextStream, text_offsets

LogprobOfToken = tuple[int, float, tuple[tuple[int, float], ...]]
"""A token with its log-probability, and the same of the likeliest ones in its place."""


def prompt_end(split: SplitPrompt) -> list[int]:
    """As many of a prompt's last tokens as a `TextStream` looks at."""
    return split.context_tokens[-PROMPT_TOKENS:] + split.query_tokens[-PROMPT_TOKENS:]


class CompletionAnswers:
    """`/v1/completions`: text, with `echo` in front of it."""

    name, prefix = "text_completion", "cmpl"
    chunk_name = name
    many_prompts = True

    def __init__(
        self,
        service: CompletionService,
        batch: Batch,
        *,
        logprobs: int | None,
        only_queries: bool = False,
        shows_prompt_logprobs: bool = False,
        as_ids: bool | None = False,
    ) -> None:
        """
        Args:
            only_queries: contexts were given beside the prompts, which are all that is repeated.
            as_ids: tokens of log-probabilities are written as their ids.
        """
        self.token_bytes, self.logprobs = token_bytes(service, as_ids), logprobs
        self._prompts = PromptLogprobs(service, batch, self.token_bytes, only_queries=only_queries)
        self._num_choices, self._shows_prompt_logprobs = batch.num_shown, shows_prompt_logprobs
        each = range(batch.num_shown)
        self.echoes = [echo for echo in batch.echoes for _ in each] or [""] * len(batch.answers)
        self._streams = []
        if logprobs is not None:
            ends = [prompt_end(split) for split in batch.splits]
            self._streams = [TextStream(service.tokenizer, end) for end in ends for _ in each]

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        tokens = zip(answer.tokens, answer.logprobs, answer.top, strict=True)
        choice = self._choice(index, self.echoes[index] + answer.text, answer.finish_reason)
        choice["logprobs"] = self._logprobs(index, list(tokens))
        if self.echoes[index] and choice["logprobs"]:
            choice["logprobs"] = self._prompts.before(index, choice["logprobs"])
        if self._shows_prompt_logprobs:
            choice["prompt_logprobs"] = self._prompts.as_vllm(index // self._num_choices)
        return choice

    def beside_choices(self) -> dict[str, Any]:
        """What a whole answer says besides them."""
        return {}

    def first(self, index: int) -> dict[str, Any] | None:
        """What comes before the first token."""
        return self._choice(index, self.echoes[index]) if self.echoes[index] else None

    def piece(self, index: int, token: NewToken) -> list[dict[str, Any]]:
        """One token, unless it says nothing."""
        if not token.text and self.logprobs is None:
            return []
        logprobs = self._logprobs(index, [(token.token, token.logprob, token.top)])
        return [self._choice(index, token.text) | {"logprobs": logprobs}]

    def last(self, index: int, result: StarResult) -> list[dict[str, Any]]:
        """The end of an answer."""
        return [self._choice(index, "", result.finish_reason)]

    def _choice(self, index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _logprobs(self, index: int, tokens: list[LogprobOfToken]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        piece = self.token_bytes.piece
        # A likely token comes before the chosen one, which may have the same text.
        top = [
            {piece(likely): its for likely, its in likeliest} | {piece(token): value}
            for token, value, likeliest in tokens
        ]
        ids = [token for token, *_ in tokens]
        return {
            "tokens": self.token_bytes.pieces(ids),
            "token_logprobs": [value for _, value, _ in tokens],
            "text_offset": list(text_offsets(self._streams[index], ids)),
            "top_logprobs": top,
        }
