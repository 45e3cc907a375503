"""What requests to OpenAI's routes may contain.

Fields that are accepted though they do nothing are in `known_fields.py`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_star.server.body import (
    LARGEST_SEED,
    Body,
    PositiveTokens,
    Share,
    StopTexts,
    Text,
    TokenCount,
    TokenId,
    TopK,
)
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.known_fields import NeutralChatFields, NeutralFields, NeutralMessageFields
from megatron_star.server.wires.prompt_fields import PromptRequest


class StreamOptions(Body):
    """`include_usage` adds a chunk with the usage at the end; `continuous_usage_stats`, counts to each."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class OpenAIFields(NeutralFields, Body):
    """Fields of both OpenAI routes."""

    model: Annotated[str, Field(max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="go on after an end token")
    min_tokens: TokenCount | None = Field(None, description="no end token and no stop text before so many")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = Field(
        None, description="further end tokens"
    )
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: it needs stream=true")
        return self


class CompletionRequest(OpenAIFields, PromptRequest):
    """POST /v1/completions."""

    max_tokens: PositiveTokens | None = None
    suffix: Literal[""] | None = None


class TextPart(Body):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(NeutralMessageFields, Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    name: Annotated[str, Field(max_length=512)] | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know it; parts are lines, as other servers join them."""
        text = (
            self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(Body):
    """The only response format."""

    type: Literal["text"]


class ChatRequest(NeutralChatFields, OpenAIFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: PositiveTokens | None = None
    max_tokens: PositiveTokens | None = Field(None, description="the old name of max_completion_tokens")
    top_p: Share | None = None
    top_k: TopK | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: StopTexts | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=1)] | None = Field(
        None, description="1: with `logprobs`, the most likely token in the place of each"
    )
    response_format: TextFormat | None = None
    star: StarOptions | None = None

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last one must have the role 'user'")
        if self.max_tokens not in (None, self.max_completion_tokens or self.max_tokens):
            raise ValueError("max_tokens: it is another number than max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: it needs logprobs=true")
        return self
