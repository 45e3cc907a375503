"""What bodies of requests are made of: numbers are finite and bounded, and unknown fields are errors."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from megatron_star.config import MOST_TOKENS_IN_REQUEST

MOST_PROMPTS = 128
LARGEST_SEED = (1 << 63) - 1


def _whole_characters(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} is half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
TokenCount = Annotated[int, Field(ge=0, le=MOST_TOKENS_IN_REQUEST)]
PositiveTokens = Annotated[int, Field(ge=1, le=MOST_TOKENS_IN_REQUEST)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopText = Annotated[Text, Field(min_length=1, max_length=256)]
StopTexts = StopText | Annotated[list[StopText], Field(max_length=16)]
Prompts = Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
TopK = Annotated[int, Field(ge=-1, le=1000, description="-1 and 0 are off")]
Zero = Annotated[float, Field(ge=0.0, le=0.0)]


def _let_lists_fail_fast(schema: Any) -> None:
    if isinstance(schema, list | tuple):
        for part in schema:
            _let_lists_fail_fast(part)
    elif isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _let_lists_fail_fast(part)


class Body(BaseModel):
    """No coercion, no NaN, no unknown field; of errors in a list only the first."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Every list of it, with `fail_fast`: a million wrong items would be a million errors."""
        schema = handler(source)
        _let_lists_fail_fast(schema)
        return schema
