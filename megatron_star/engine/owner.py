"""Whose a request is: with whom it shares contexts, and its place among others."""

import hashlib
import json
from dataclasses import dataclass

DEFAULT_TENANT = "default"
"""Of a server with one key without a name. It has what was encoded where there are no tenants."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """
    Attributes:
        tenant, cache_salt, priority: see `StarRequest`.
        share: of the work, relative to other tenants.
    """

    tenant: str = ""
    cache_salt: str = ""
    priority: int = 0
    share: float = 1.0

    @property
    def salt(self) -> bytes:
        """Enters every hash of a context: those of different salts share nothing."""
        if self.tenant in ("", DEFAULT_TENANT) and not self.cache_salt:
            return b""
        tenant = "" if self.tenant == DEFAULT_TENANT else self.tenant
        return hashlib.sha256(json.dumps([tenant, self.cache_salt]).encode()).digest()
