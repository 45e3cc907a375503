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
        """Requests are taken; with trouble they wait, as answers do."""
        return self.service is not None and not self.draining

    @property
    def trouble(self) -> str | None:
        """Why answers do not come at present, if they do not."""
        return self.service.engine.trouble() if self.service else None

    @property
    def name(self) -> str:
        """`loading`, `ready`, `draining` or `stalled`."""
        if self.service is None:
            return "loading"
        if self.draining:
            return "draining"
        return "stalled" if self.trouble else "ready"
