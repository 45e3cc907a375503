"""What requests may contain.

Fields that are accepted though they do nothing are in `known_fields.py`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from megatron_star.config import MOST_TOKENS_IN_REQUEST
from megatron_star.server.body import (
    LARGEST_SEED,
    MOST_PROMPTS,
    Body,
    PositiveTokens,
    Prompts,
    Share,
    StopTexts,
    Text,
    TokenCount,
    TokenId,
    TopK,
    Zero,
)
from megatron_star.server.known_fields import (
    NeutralChatFields,
    NeutralFields,
    NeutralMessageFields,
    only,
)
from megatron_star.server.star_options import StarOptions


class MegatronGenerateRequest(Body):
    """PUT /api: the fields of Megatron's server; `contexts` and `star` are ours."""

    prompts: Prompts
    contexts: Prompts | None = Field(None, description="one for all prompts, or one for each")
    tokens_to_generate: PositiveTokens | None = Field(None, description="64, or what is left for them")
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_k: TopK = 0
    top_p: Share = 0.0
    top_p_decay: Zero = 0.0
    top_p_bound: Zero = 0.0
    logprobs: bool = False
    add_BOS: bool = False
    random_seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    stop_token: TokenId | None = None
    stop_on_eol: bool = False
    stop_on_double_eol: bool = False
    prevent_newline_after_colon: Literal[False] = False
    beam_width: only() = None
    no_log: only(True, False) = Field(None, description="no text is logged in any case")
    length_penalty: Annotated[float, Field(ge=1.0, le=1.0)] = 1.0
    star: StarOptions = Field(default_factory=StarOptions)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            key: value for key, value in values.items() if value is not None or key not in cls.model_fields
        }

    @model_validator(mode="after")
    def _one_context_or_one_each(self) -> Self:
        count = len(self.prompts)
        if self.contexts and len(self.contexts) not in (1, count):
            raise ValueError(f"contexts: {len(self.contexts)} given for {count} prompts: give 1 or {count}")
        return self


class PromptRequest(Body):
    """What both servers' completions have in common."""

    prompt: (
        Text
        | Prompts
        | Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS_IN_REQUEST)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(max_length=MOST_PROMPTS)]
    )
    contexts: Prompts | None = Field(None, description="one for all prompts, or one for each")
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = Field(None, description="1 or n")
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: StopTexts | None = None
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = Field(
        None,
        description="0: of the tokens that were chosen; 1: and of the most likely one in the place of each",
    )
    echo: bool | None = None
    star: StarOptions | None = None

    @model_validator(mode="after")
    def _one_context_or_one_each(self) -> Self:
        count = len(self.prompts())
        if count == 0:
            raise ValueError("prompt: it is empty")
        if self.contexts and len(self.contexts) not in (1, count):
            raise ValueError(f"contexts: {len(self.contexts)} given for {count} prompts: give 1 or {count}")
        if self.best_of not in (None, 1, self.n):
            raise ValueError("best_of: only null, 1 or n is supported here")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompt, as a list of prompts."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return self.prompt


class MegatronCompletionRequest(NeutralFields, PromptRequest):
    """POST /completions: as Megatron's server reads it."""

    max_tokens: PositiveTokens
    stream: only(False) = None
    model: str | None = Field(None, description="ignored, as by Megatron's server")


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


class ErrorDetail(BaseModel):
    """What is wrong; `param` is the field that is meant."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every error."""

    message: str
    error: ErrorDetail
