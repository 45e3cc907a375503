"""The file that a run writes and a later run continues: nobody else's, no input, and one job's at a time."""

import errno
import fcntl
import json
import os
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

PROGRAM = "program"
"""The first key of everything that is written here; its value is the name of the program."""
OTHER_OUTPUT = "give another --output"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

Inputs = Mapping[str, str | Path | None]
"""Files that a program reads, by the option that names them."""


def check_not_an_input(output: str | Path, inputs: Inputs, advice: str = OTHER_OUTPUT) -> None:
    """Raises ValueError if the output is one of the inputs, also by another name or link of it."""
    for option, path in inputs.items():
        if path and os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):
            raise ValueError(f"{output}: is what {option} reads: {advice}")


class OutputFile:
    """A file that is this job's until `close`; its lock ends with the process, however that ends.

    It exists from the start, so that a folder which is missing or closed shows then and not after the work.
    What is in it stays as it is until there is something to write.
    """

    def __init__(self, path: str, program: str, inputs: Inputs) -> None:
        """
        Raises:
            ValueError: the output is an input, is no regular file, or is being written by another job.
            OSError: it cannot be made, or not be written to.
        """
        check_not_an_input(path, inputs)
        self.path, self.program = path, program
        folder = Path(path).parent
        if not folder.is_dir():
            raise ValueError(f"{path}: there is no folder {folder}")
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}: is no regular file: {OTHER_OUTPUT}")
        self._made_here = not os.path.exists(path)
        self._descriptor = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have it; one that was made here and got nothing is removed."""
        if self._made_here and not os.fstat(self._descriptor).st_size:
            with suppress(OSError):
                os.unlink(self.path)
        os.close(self._descriptor)

    def _open(self) -> int:
        """Locked, and still the file of that name: another job may have removed its own empty one."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._lock(descriptor)
                if os.path.exists(self.path) and os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another job is writing to it: {OTHER_OUTPUT}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"warning: {self.path}: its file system has no locks: start one job only", file=sys.stderr)

    def _content(self) -> bytes:
        with open(self._descriptor, "rb", closefd=False) as file:
            return file.read()

    def _encoded(self, record: Mapping[str, Any], **layout: Any) -> bytes:
        try:
            text = json.dumps(
                {PROGRAM: self.program, **record}, ensure_ascii=False, allow_nan=False, **layout
            )
        except ValueError as error:
            raise ValueError(f"{self.path}: the answer {record.get('id')!r}: {error}") from error
        return f"{text}\n".encode()
