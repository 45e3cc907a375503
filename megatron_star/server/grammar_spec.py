"""What a request says that its answers must look like, before it is compiled."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GrammarSpec:
    """
    Attributes:
        kind: `json_object`, any JSON object; `json_schema`, JSON that this schema allows; `regex`, a text
            that this matches as a whole; `choice`, one of a JSON list of texts; `lark`, a grammar as
            llguidance reads it, which may have `%json {...}` and special tokens.
        text: of that kind.
        field: of the request, that an error names.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    text: str
    field: str
