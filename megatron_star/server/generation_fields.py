"""Sampling fields that mean the same on several routes."""

from typing import NamedTuple


class Filters(NamedTuple):
    """Which tokens are left to draw from; 0 is off."""

    top_k: int
    top_p: float


def filters(top_k: int | None, top_p: float | None, *, zero_is_off: bool) -> Filters:
    """`top_k` and `top_p` as the engine reads them, where 1 (OpenAI's default) leaves all tokens in.

    Args:
        zero_is_off: a `top_p` of 0 does so too, as in Megatron; else it leaves the most likely token.
    """
    if top_p == 0.0 and not zero_is_off:
        return Filters(1, 0.0)
    return Filters(max(0, top_k or 0), 0.0 if top_p is None or top_p >= 1.0 else top_p)


def stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    """One text or several, as a tuple."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())
