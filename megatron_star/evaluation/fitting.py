"""The longest text that stays within a number of tokens, with few tokenizations."""

from collections.abc import Callable


def largest_fitting(
    num_tokens: Callable[[int], int], limit: int, *, smallest: int, largest: int | None = None
) -> int:
    """The number of units, from `smallest` to `largest`, of which one more would exceed `limit` tokens.

    Args:
        num_tokens: tokens of so many units; grows about linearly, and was called with the result.

    Raises:
        ValueError: not even `smallest` units fit.
    """
    fits, used = smallest, num_tokens(smallest)
    if used > limit:
        raise ValueError(f"{limit} tokens are too few: at least {used} are needed")
    too_many = None if largest is None else largest + 1
    per_unit = max(1.0, used / max(1, smallest))
    while too_many is None or too_many - fits > 1:
        step = max(1, int((limit - used) / per_unit))
        candidate = fits + step if too_many is None else min(fits + step, too_many - 1)
        tokens = num_tokens(candidate)
        if tokens > limit:
            too_many = candidate
            per_unit = max(per_unit, (tokens - used) / (candidate - fits))
        else:
            per_unit = max(0.1, (tokens - used) / (candidate - fits))
            fits, used = candidate, tokens
    return fits
