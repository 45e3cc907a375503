"""API keys: who may come in, under which name, and how much each may have in flight.

A file has one key in one line; or TOML, with a table for each key:

    [anna]
    key = "a long random text"
    max_requests = 8        # sequences in flight: prompts times n
    max_tokens = 200_000    # in flight: context, query, and what may be generated
    share = 2.0             # of the work, relative to other keys
    highest_priority = -1   # that its requests may ask for; lower is earlier
"""

import hmac
import re
import stat
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from megatron_star.checked_input import read_text
from megatron_star.engine.owner import DEFAULT_TENANT

MOST_KEYS = 1024
LARGEST_PRIORITY = 1 << 31
LARGEST_SHARE = 1000.0
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """
    Attributes:
        name: of the key; "" where no key is asked for.
        max_requests: sequences in flight; None is no limit of its own.
        max_tokens: in flight: context, query, and generated at most.
        share: of the work, relative to other keys.
        highest_priority: the lowest number that its requests may ask for.
    """

    name: str = ""
    max_requests: int | None = None
    max_tokens: int | None = None
    share: float = 1.0
    highest_priority: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError, naming the value and the bound."""
        for limit in ("max_requests", "max_tokens"):
            value = getattr(self, limit)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{limit} is {value!r}: it must be a whole number of at least 1")
        share = self.share
        if type(share) not in (int, float) or not 1 / LARGEST_SHARE <= share <= LARGEST_SHARE:
            raise ValueError(
                f"share is {share!r}: it must be a number from {1 / LARGEST_SHARE} to {LARGEST_SHARE}"
            )
        priority = self.highest_priority
        if type(priority) is not int or not abs(priority) < LARGEST_PRIORITY:
            raise ValueError(f"highest_priority is {priority!r}: it must be a whole number of 32 bits")


@dataclass(frozen=True)
class ApiKey:
    """A key and what it allows; the key itself is not kept."""

    limits: KeyLimits
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, key: str, **limits: Any) -> Self:
        """Raises ValueError if the key or a limit is none."""
        if key == "":
            raise ValueError("the API key is empty")
        if not isinstance(key, str) or not (key.isascii() and key.isprintable()):
            raise ValueError("the API key must be one line of printable ASCII characters")
        return cls(KeyLimits(**limits), sha256(key.encode()).digest())


class KeyRing:
    """The keys that are valid; any thread may ask, and have them read anew."""

    def __init__(self, keys: Iterable[ApiKey], path: str | Path | None = None) -> None:
        """path: where `reload` finds them."""
        self._keys, self._path = tuple(keys), path

    @classmethod
    def of_file(cls, path: str | Path) -> Self:
        """Raises ValueError or OSError."""
        return cls(parse_keys(read_text(path), str(path)), path)

    def reload(self) -> int:
        """Read the file again; those that were valid stay if it is wrong. Returns how many there are.

        Raises:
            ValueError, OSError: as `of_file`.
        """
        assert self._path is not None
        self._keys = parse_keys(read_text(self._path), str(self._path))
        return len(self._keys)

    def warning(self) -> str | None:
        """What a person should know of the file: that others can read it."""
        if self._path and Path(self._path).stat().st_mode & stat.S_IROTH:
            return f"{self._path}: everybody on this machine can read the keys: chmod 600 it"
        return None

    def holder(self, given: bytes) -> KeyLimits | None:
        """Whose key that is. Takes as long whichever it is, and if it is none."""
        digest, found = sha256(given).digest(), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key.limits
        return found

    def limits(self, name: str) -> KeyLimits:
        """Of the key of this name; of one that is gone by now, none of its own."""
        return next((key.limits for key in self._keys if key.limits.name == name), KeyLimits(name=name))

    @property
    def names(self) -> list[str]:
        """Of all keys."""
        return [key.limits.name for key in self._keys]


def parse_keys(text: str, where: str) -> tuple[ApiKey, ...]:
    """The keys of a file's text.

    Raises:
        ValueError: it has none, or something else; `where` comes first. No key is in the message.
    """
    try:
        tables = _tables(text)
        if tables is None:
            return (ApiKey.of(text.strip(), name=DEFAULT_TENANT),)
        keys = tuple(_named_key(name, table) for name, table in tables.items())
        if len(keys) > MOST_KEYS:
            raise ValueError(f"{len(keys)} keys: at most {MOST_KEYS} fit")
        if len({key.digest for key in keys}) < len(keys):
            raise ValueError("two names have the same key")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return keys


def _tables(text: str) -> dict[str, Any] | None:
    """What a TOML text has; None of a text that is a key."""
    is_a_line = "\n" not in text.strip()
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        if is_a_line:
            return None
        raise ValueError(f"neither a key in one line nor TOML: {error}") from error
    if is_a_line and not any(isinstance(table, dict) for table in tables.values()):
        return None
    return tables


def _named_key(name: str, table: Any) -> ApiKey:
    known = {"key", *(one.name for one in fields(KeyLimits))} - {"name"}
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:70]!r} is no name of a key: up to 64 letters, digits, '.', '_' and '-'")
    if not isinstance(table, dict) or "key" not in table:
        raise ValueError(f"[{name}] has no key")
    if unknown := table.keys() - known:
        raise ValueError(f"[{name}] has {min(unknown)!r}: known are {', '.join(sorted(known))}")
    try:
        return ApiKey.of(table["key"], name=name, **{k: v for k, v in table.items() if k != "key"})
    except ValueError as error:
        raise ValueError(f"[{name}]: {error}") from error
