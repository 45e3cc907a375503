"""Bodies of requests: parsed and checked away from the event loop, in bounded time."""

import asyncio
import json
from collections.abc import Callable, Sized
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_star.server.errors import RequestError, describe_validation

MOST_PARTS = 1 << 16
"""Objects, lists, names and texts in one body: each is memory and time, where one long text is neither."""
MOST_NUMBERS = 1 << 20
"""Or twice as many as the model takes tokens."""
MOST_NAMES = 1024
"""Of one object."""
MOST_MESSAGES = 4096
LONG_BODY_BYTES = 1 << 16
REST_AFTER_LONG_BODIES = 3.0
"""Parsing stops Python's other threads, and so all answers: after it, they have so many times as long."""


class BodyChecker:
    """Checks bodies in two threads of its own: one for short ones, so that long ones do not hold them up."""

    def __init__(self) -> None:
        self._short, self._long = ThreadPoolExecutor(1, "body"), ThreadPoolExecutor(1, "long-body")
        self._rests_until = 0.0

    async def check(self, body: bytes, adapter: TypeAdapter, most_items: int) -> Any:
        """What the adapter makes of a body; see `checked`."""
        return await self.run(checked, body, adapter, most_items)

    async def run[T](self, function: Callable[..., T], body: Sized, *args: Any) -> T:
        """What `function` makes of a body, or of what has become of one."""
        is_long = len(body) > LONG_BODY_BYTES
        pool, run = (self._long, self._run_long) if is_long else (self._short, _run)
        return await asyncio.get_running_loop().run_in_executor(pool, run, function, body, *args)

    def _run_long[T](self, function: Callable[..., T], *args: Any) -> T:
        sleep(max(0.0, self._rests_until - monotonic()))
        start = monotonic()
        try:
            return function(*args)
        finally:
            end = monotonic()
            self._rests_until = end + REST_AFTER_LONG_BODIES * (end - start)


def _run[T](function: Callable[..., T], *args: Any) -> T:
    return function(*args)


def checked(body: bytes, adapter: TypeAdapter, most_items: int) -> Any:
    """What the adapter makes of a JSON text. Sizes are looked at before what is in them.

    Args:
        most_items: of a list: the tokens that the model takes.

    Raises:
        RequestError: it is no JSON, has too many parts, or is not what the adapter wants.
    """
    _check_amount(body, max(MOST_NUMBERS, 2 * most_items))
    try:
        values = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {error}") from error
    _check_sizes(values, max(most_items, MOST_MESSAGES))
    return validated(values, adapter)


def validated(values: Any, adapter: TypeAdapter) -> Any:
    """What the adapter makes of parsed values. Raises RequestError."""
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    raise RequestError(400, *describe_validation(errors))


def _check_amount(body: bytes, most_numbers: int) -> None:
    """Counts bytes, which takes next to no time; where there are many, again without those within texts."""
    if _within_bounds(body, most_numbers):
        return
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') <= 2 * MOST_PARTS and _within_bounds(b"".join(bare.split(b'"')[::2]), most_numbers):
        return
    raise RequestError(
        400, f"the body has more than {MOST_PARTS} objects, lists, names and texts, or {most_numbers} numbers"
    )


def _within_bounds(body: bytes, most_numbers: int) -> bool:
    return sum(map(body.count, (b"[", b"{", b":"))) <= MOST_PARTS and body.count(b",") <= most_numbers


def _check_sizes(values: Any, most_items: int) -> None:
    found = [("the body", values)] if isinstance(values, dict | list) else []
    while found:
        name, value = found.pop()
        named = value.items() if isinstance(value, dict) else ((name, item) for item in value)
        most = MOST_NAMES if isinstance(value, dict) else most_items
        if len(value) > most:
            raise RequestError(
                400, f"{name[:100]}: it has {len(value)} parts; the limit is {most}", name[:100]
            )
        found += [(inner, part) for inner, part in named if isinstance(part, dict | list)]
