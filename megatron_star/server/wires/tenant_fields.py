"""Fields that say whose a request is, and how urgent."""

from typing import Annotated, Any

from pydantic import BaseModel, Field

LARGEST_PRIORITY = 1 << 31
Priority = Annotated[int, Field(ge=-LARGEST_PRIORITY, lt=LARGEST_PRIORITY, strict=True)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=512)]


class TenantFields(BaseModel):
    """On both OpenAI routes."""

    priority: Priority | None = Field(
        None, description="lower is earlier; before 0 only with a key that allows it"
    )
    cache_salt: CacheSalt | None = Field(
        None, description="what is encoded for a request is used by those with the same one"
    )

    def owner(self) -> dict[str, Any]:
        """As `Ask` takes it."""
        return {"priority": self.priority or 0, "cache_salt": self.cache_salt or ""}
