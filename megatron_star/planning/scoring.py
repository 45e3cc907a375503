"""What is asked about the tokens of a context, and which of them each wave tells of: integers only."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_star.planning.segment import Wave


class Scoring(NamedTuple):
    """Scores that are wanted of a context: of how many likeliest tokens, and what follows its last token."""

    num_top: int
    next_token: int | None


def tokens_after(token_ids: Sequence[int], positions: Sequence[int], scoring: Scoring) -> list[int]:
    """What follows each of these positions of a context; -1 where nothing does."""
    last = -1 if scoring.next_token is None else scoring.next_token
    return [token_ids[p + 1] if p + 1 < len(token_ids) else last for p in positions]


def offsets_in_wave(wave: Wave) -> dict[int, int]:
    """Where each segment's scores begin in those of a wave, by its first token."""
    offsets, num_tokens = {}, 0
    for segment in wave:
        offsets[segment.start] = num_tokens
        num_tokens += segment.num_tokens
    return offsets
