"""Fields that say whose a request is, and how urgent."""

from pydantic import BaseModel

from megatron_star.server.wires.known_fields import only


class TenantFields(BaseModel):
    """On both OpenAI routes."""

    priority: only(0) = None
    cache_salt: only() = None
