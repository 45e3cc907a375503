"""Fields that name a context that was sent before."""

from typing import Annotated, Any

from pydantic import BaseModel, Field


class ContextFields(BaseModel):
    """On all routes that answer."""

    context_id: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None, description="of /v1/contexts: the prompt, or the first message of the user, follows it"
    )

    def named_context(self) -> dict[str, Any]:
        """As `Ask` takes it."""
        return {"context_id": self.context_id}
