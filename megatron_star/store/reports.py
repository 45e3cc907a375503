"""What whoever runs a job is told about its context store."""

import sys
from collections.abc import Callable


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class ReportedOnce:
    """Reports each trouble once, however often it comes."""

    def __init__(self, tell: Callable[[str], None] = warn) -> None:
        self._tell, self._told = tell, set()

    def __call__(self, message: str, what: object = None) -> None:
        """what: that makes two of them the same; by default, the message."""
        key = message if what is None else what
        if key not in self._told:
            self._told.add(key)
            self._tell(message)
