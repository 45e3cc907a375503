"""What says that an entry of a context store is complete, and what is in it: one small file, written last.

An entry is a folder: the manifest, and one file for each rank that has written it. The manifest is JSON and,
on a line of its own, a checksum of that JSON; it has the checksum of each file's header, and the header those
of its tensors. So nothing that is read is believed unless it is what was written. No pickle, and no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

FORMAT = 1
"""Of manifests and files; another one is another identity, and never read."""
MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 1 << 24
CHECKSUM_BYTES = 16


class DamagedEntry(ValueError):
    """An entry, or a file of it, is not what was written."""


def checksum_of(*pieces: bytes | memoryview) -> str:
    """Of these bytes, one after the other: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


_Count = Annotated[int, Field(ge=0)]
_Checksum = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * CHECKSUM_BYTES}}}$")]


@with_config(ConfigDict(strict=True, extra="forbid"))
@dataclass(frozen=True)
class FileRecord:
    """A rank's file: its size, and the checksum of its header."""

    num_bytes: _Count
    header: _Checksum


@with_config(ConfigDict(strict=True, extra="forbid"))
@dataclass(frozen=True)
class Manifest:
    """
    Attributes:
        identity: what the entry's name is a hash of (`identity.py`).
        star: the `StarConfig` that its plan was made from.
        cp_size: of the ranks that have written it.
        model: the name of the checkpoint, for people.
        files: by name.
    """

    identity: dict[str, str | int]
    star: dict[str, Any]
    cp_size: Annotated[int, Field(ge=1)]
    model: str
    files: Mapping[str, FileRecord]

    @property
    def num_bytes(self) -> int:
        """Of all its files, without the manifest."""
        return sum(record.num_bytes for record in self.files.values())

    def to_bytes(self) -> bytes:
        """What `read_manifest` reads."""
        text = json.dumps(asdict(self), sort_keys=True).encode()
        return b"\n".join((text, checksum_of(text).encode(), b""))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The manifest of `to_bytes`; raises ValueError if it is another's, or damaged."""
        text, _, checksum = content.rstrip(b"\n").rpartition(b"\n")
        if checksum != checksum_of(text).encode():
            raise ValueError("its checksum is not that of its text")
        try:
            return _MANIFEST.validate_json(text)
        except ValidationError as error:
            raise ValueError(str(error.errors()[0]["msg"])) from error


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(path: Path) -> Manifest:
    """
    Raises:
        OSError: it cannot be read; FileNotFoundError where there is none.
        DamagedEntry: it is not what was written.
    """
    with path.open("rb") as file:
        content = file.read(MOST_MANIFEST_BYTES + 1)
    if len(content) > MOST_MANIFEST_BYTES:
        raise DamagedEntry(f"{path}: more than {MOST_MANIFEST_BYTES:,} bytes: not a manifest")
    try:
        return Manifest.from_bytes(content)
    except ValueError as error:
        raise DamagedEntry(f"{path}: damaged: {error}") from error
