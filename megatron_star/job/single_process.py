"""The end of a program that is one process, without ranks; `session.py` has that of a rank."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_star.parallel.control import describe

USER_ERROR_STATUS = 2


@contextmanager
def exit_on_user_errors() -> Iterator[None]:
    """End with one line and status 2 on what users can put right; other errors keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(describe(error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
