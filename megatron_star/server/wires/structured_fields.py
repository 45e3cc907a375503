"""Fields that say what an answer must look like."""

from typing import Literal

from pydantic import BaseModel

from megatron_star.server.body import Body
from megatron_star.server.grammar_spec import GrammarSpec
from megatron_star.server.wires.known_fields import only


class TextFormat(Body):
    """The only response format."""

    type: Literal["text"]


class StructuredFields(BaseModel):
    """On both OpenAI routes."""

    response_format: TextFormat | None = None
    structured_outputs: only() = None
    guided_json: only() = None
    guided_regex: only() = None
    guided_choice: only() = None
    guided_grammar: only() = None
    guided_decoding_backend: only() = None

    def grammar(self) -> GrammarSpec | None:
        """What is asked, if anything. Raises FieldError."""
        return None
