"""Fields that name a context that was sent before."""

from pydantic import BaseModel

from megatron_star.server.wires.known_fields import only


class ContextFields(BaseModel):
    """On all routes that answer."""

    context_id: only() = None
