"""The `star` object of a request."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from megatron_star.config import OPTIONS, SPECULATE, Option
from megatron_star.server.body import Body, PositiveTokens, Text


def _type(option: Option) -> Any:
    if option.choices:
        return Literal[option.choices] | None
    return Annotated[int, Field(ge=option.least, le=option.most_in_request)] | None


EncodingOptions = create_model(
    "EncodingOptions",
    __base__=Body,
    **{name: (_type(option), None) for name, option in OPTIONS.items() if option.in_requests},
)


class StarOptions(EncodingOptions):
    """How this request's context is encoded, where it ends, and how tokens are guessed.

    What is left out is the server's default.
    """

    query_tokens: PositiveTokens | None = Field(None, description="so many last tokens are the query")
    separator: Annotated[Text, Field(min_length=1, max_length=256)] | None = Field(
        None, description="the context stands before its last occurrence, the query after it"
    )

    speculate: Literal[SPECULATE] | None = Field(None, description="guessed tokens, several a step, or none")

    attention_map: bool | None = Field(None, description="say where the answer looked in the context")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.query_tokens is not None and self.separator is not None:
            raise ValueError("set query_tokens or separator, not both")
        return self

    def encoding(self) -> dict[str, Any]:
        """The fields of a StarConfig that are set."""
        return self.model_dump(include=set(EncodingOptions.model_fields), exclude_none=True)
