"""Answers of /v1/chat/completions: messages of the assistant."""

from typing import Any

from megatron_star.engine.answer import Answer, NewToken
from megatron_star.engine.request import StarResult
from megatron_star.server.service import CompletionService
from megatron_star.server.wires.completion_answers import LogprobOfToken
from megatron_star.server.wires.token_ids import token_bytes

Likely = tuple[tuple[int, float], ...]


def with_chosen(top: Likely, token: int, logprob: float) -> Likely:
    """The likeliest tokens, if any were asked for, and the chosen one, whose log-probability this is."""
    return top if not top or token in dict(top) else (*top, (token, logprob))


class ChatAnswers:
    """`/v1/chat/completions`: messages of the assistant."""

    name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    many_prompts = False

    def __init__(self, service: CompletionService, *, logprobs: bool, as_ids: bool | None = False) -> None:
        """as_ids: tokens of log-probabilities are written as their ids."""
        self.token_bytes, self.logprobs = token_bytes(service, as_ids), logprobs

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        tokens = zip(answer.tokens, answer.logprobs, answer.top, strict=True)
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(list(tokens)) if self.logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """The role comes before the first token."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, token: NewToken) -> dict[str, Any] | None:
        """One token, unless it says nothing."""
        if not token.text and not self.logprobs:
            return None
        tokens = [(token.token, token.logprob, token.top)]
        logprobs = self._logprobs(tokens) if self.logprobs else None
        return self._chunk(index, {"content": token.text}) | {"logprobs": logprobs}

    def last(self, index: int, result: StarResult) -> dict[str, Any]:
        """The end of an answer."""
        return self._chunk(index, {}) | {"finish_reason": result.finish_reason}

    def _chunk(self, index: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: list[LogprobOfToken]) -> dict[str, Any]:
        content = [
            self._token(token, value)
            | {"top_logprobs": [self._token(*likely) for likely in with_chosen(top, token, value)]}
            for token, value, top in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        value = self.token_bytes.of(token)
        values = None if value is None else list(value)
        return {"token": self.token_bytes.piece(token), "logprob": logprob, "bytes": values}
