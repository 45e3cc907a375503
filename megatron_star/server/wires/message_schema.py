"""Messages of a chat, as a request has them."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_star.server.body import Body, Text
from megatron_star.server.wires.known_fields import NeutralMessageFields


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
