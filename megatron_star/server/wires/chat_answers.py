"""Answers of /v1/chat/completions: messages of the assistant."""

from typing import Any

from megatron_star.engine.answer import Answer, NewToken
from megatron_star.engine.request import StarResult
from megatron_star.server.service import CompletionService
from megatron_star.server.tools.deltas import Arguments, Call, Content, Delta, Reasoning
from megatron_star.server.tools.tool_use import AnswerReading
from megatron_star.server.wires.completion_answers import LogprobOfToken
from megatron_star.server.wires.prompt_logprobs import PromptLogprobs
from megatron_star.server.wires.token_ids import token_bytes

REASONING = ("reasoning_content", "reasoning")
"""What its field is called: by DeepSeek, vLLM and LangChain; and by newer servers."""
Likely = tuple[tuple[int, float], ...]


def with_chosen(top: Likely, token: int, logprob: float) -> Likely:
    """The likeliest tokens, if any were asked for, and the chosen one, whose log-probability this is."""
    return top if not top or token in dict(top) else (*top, (token, logprob))


class ChatAnswers:
    """`/v1/chat/completions`: messages of the assistant."""

    name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    many_prompts = False

    def __init__(
        self,
        service: CompletionService,
        reading: AnswerReading,
        *,
        logprobs: bool,
        prompts: PromptLogprobs | None = None,
        as_ids: bool | None = False,
    ) -> None:
        """
        Args:
            reading: of the answers, in their order.
            prompts: whose log-probabilities are asked for, too.
            as_ids: tokens of log-probabilities are written as their ids.
        """
        self.token_bytes, self.logprobs, self._prompts = token_bytes(service, as_ids), logprobs, prompts
        self._reading, self._num_calls = reading, [0] * len(reading.parsers)

    def beside_choices(self) -> dict[str, Any]:
        """What a whole answer says besides them."""
        return {"prompt_logprobs": self._prompts.as_vllm(0)} if self._prompts else {}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        tokens = zip(answer.tokens, answer.logprobs, answer.top, strict=True)
        return {
            "index": index,
            "message": self._message(index, answer.text),
            "logprobs": self._logprobs(list(tokens)) if self.logprobs else None,
            "finish_reason": self._finish_reason(index, answer.finish_reason),
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """The role comes before the first token."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, token: NewToken) -> list[dict[str, Any]]:
        """What is certain with one more token: nothing, or several things."""
        chunks = self._chunks(index, self._reading.parsers[index].add(token.text))
        if self.logprobs:
            chunks = chunks or [self._chunk(index, {"content": ""})]
            chunks[0]["logprobs"] = self._logprobs([(token.token, token.logprob, token.top)])
        return chunks

    def last(self, index: int, result: StarResult) -> list[dict[str, Any]]:
        """The end of an answer."""
        chunks = self._chunks(index, self._reading.parsers[index].finish())
        reason = self._finish_reason(index, result.finish_reason)
        return [*chunks, self._chunk(index, {}) | {"finish_reason": reason}]

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _chunks(self, index: int, deltas: list[Delta]) -> list[dict[str, Any]]:
        return [self._chunk(index, told) for delta in deltas if (told := self._told(index, delta))]

    def _told(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """A part of an answer, as a stream tells it."""
        match delta:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return dict.fromkeys(REASONING, text) if self._reading.with_reasoning else None
            case Call(name):
                self._num_calls[index] += 1
                function = {"name": name, "arguments": ""}
                call = {"id": self._reading.new_call_id(), "type": "function", "function": function}
            case Arguments(text):
                call = {"function": {"arguments": text}}
        return {"tool_calls": [{"index": self._num_calls[index] - 1} | call]}

    def _message(self, index: int, text: str) -> dict[str, Any]:
        """A whole answer's, of what a stream would tell of it."""
        parser = self._reading.parsers[index]
        texts, calls = {"content": ""}, []
        for told in filter(None, (self._told(index, delta) for delta in parser.add(text) + parser.finish())):
            for call in told.pop("tool_calls", ()):
                if "id" in call:
                    calls.append({name: call[name] for name in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
            texts |= {name: texts.get(name, "") + more for name, more in told.items()}
        if len(texts) > 1 or calls:
            texts["content"] = texts["content"] or None
        return {"role": "assistant", "refusal": None} | texts | ({"tool_calls": calls} if calls else {})

    def _finish_reason(self, index: int, reason: str) -> str:
        return "tool_calls" if reason == "stop" and self._num_calls[index] else reason

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
