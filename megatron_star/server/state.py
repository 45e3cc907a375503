"""Where the server is in its life, and how many requests are inside."""

from dataclasses import dataclass

from megatron_star.server.completion import CompletionService


@dataclass
class ServerState:
    """Written by the main thread (service, draining) and by the HTTP thread (num_active)."""

    service: CompletionService | None = None
    draining: bool = False
    num_active: int = 0

    @property
    def ready(self) -> bool:
        """Requests are taken."""
        return self.service is not None and not self.draining

    @property
    def name(self) -> str:
        """`loading`, `ready` or `draining`."""
        if self.service is None:
            return "loading"
        return "draining" if self.draining else "ready"
