"""What requests to /tokenize and /detokenize may contain: vLLM's fields."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from megatron_star.server.body import Body, Text, TokenId
from megatron_star.server.wires.known_fields import only
from megatron_star.server.wires.message_schema import Messages
from megatron_star.server.wires.template_fields import TemplateFields
from megatron_star.server.wires.tool_fields import ToolFields

Model = Annotated[str, Field(max_length=512)]
OF_A_CHAT = {*TemplateFields.model_fields, "tools"} - {"messages"}


class TokenizeRequest(ToolFields, TemplateFields, Body):
    """POST /tokenize: a text, or messages as the chat template writes them."""

    model: Model | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="true with a prompt, false with messages")
    return_token_strs: bool | None = None
    media_io_kwargs: only({}) = None
    mm_processor_kwargs: only({}) = None

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either this or messages")
        if self.prompt is not None:
            for field in OF_A_CHAT & self.model_fields_set:
                if getattr(self, field) is not None:
                    raise ValueError(f"{field}: it needs messages")
        return self

    def with_special_tokens(self) -> bool:
        """Those that the tokenizer puts around a text are added; a chat template writes its own."""
        return self.prompt is not None if self.add_special_tokens is None else self.add_special_tokens


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Model | None = None
    tokens: list[TokenId]
