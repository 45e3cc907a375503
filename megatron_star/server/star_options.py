"""The `star` object of a request."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_star.server.body import Body, PositiveTokens, Text, TokenCount


class StarOptions(Body):
    """How this request's context is encoded, and where it ends; what is left out is the server's default."""

    mode: Literal["star", "exact", "auto"] | None = None
    block_size: PositiveTokens | None = None
    anchor_size: TokenCount | None = None
    neighbor_blocks: Annotated[int, Field(ge=0, le=1024)] | None = None
    query_tokens: PositiveTokens | None = Field(None, description="so many last tokens are the query")
    separator: Annotated[Text, Field(min_length=1, max_length=256)] | None = Field(
        None, description="the context stands before its last occurrence, the query after it"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.query_tokens is not None and self.separator is not None:
            raise ValueError("set query_tokens or separator, not both")
        return self

    def encoding(self) -> dict[str, Any]:
        """The fields of a StarConfig that are set."""
        return self.model_dump(exclude={"query_tokens", "separator"}, exclude_none=True)
