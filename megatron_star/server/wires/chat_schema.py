"""What a request to /v1/chat/completions may contain."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from megatron_star.engine.request import MOST_TOP_LOGPROBS
from megatron_star.server.body import PositiveTokens
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.generation_fields import GenerationFields
from megatron_star.server.wires.known_fields import NeutralChatFields
from megatron_star.server.wires.template_fields import MOST_DOCUMENTS, Document, Effort, TemplateFields
from megatron_star.server.wires.tool_fields import ToolFields


class ChatRequest(ToolFields, TemplateFields, NeutralChatFields, GenerationFields):
    """POST /v1/chat/completions."""

    documents: Annotated[list[Document], Field(max_length=MOST_DOCUMENTS)] | None = Field(
        None, description="where the template has a place for them"
    )
    reasoning_effort: Effort | None = Field(None, description="for the template, if it asks for it")
    max_completion_tokens: PositiveTokens | None = None
    max_tokens: PositiveTokens | None = Field(None, description="the old name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = Field(
        None, description="with `logprobs`: so many of the likeliest tokens in the place of each"
    )
    star: StarOptions | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.max_tokens not in (None, self.max_completion_tokens or self.max_tokens):
            raise ValueError("max_tokens: it is another number than max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: it needs logprobs=true")
        return self
