"""Sampling fields that mean the same on several routes."""

from megatron_star.server.errors import RequestError


def chosen_top_p(top_k: int | None, top_p: float | None) -> float:
    """`top_p`, where 1 (OpenAI's default) and 0 (Megatron's) are off; top_k and top_p exclude each other."""
    chosen = 0.0 if top_p is None or top_p >= 1.0 else top_p
    if top_k and chosen:
        raise RequestError(400, "top_p: set top_k or top_p, not both", "top_p")
    return chosen


def stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    """One text or several, as a tuple."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())
