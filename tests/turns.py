"""Contexts in turns, as the ranks are told of them."""

from megatron_star.config import StarConfig
from megatron_star.engine.command import OpenedContext


def opened_turn(turn: int, token_ids: list[int], star: StarConfig, turns: tuple[int, ...]) -> OpenedContext:
    """The context of a turn, which extends that of the turn before."""
    start, edges = turns[turn - 1] if turn else 0, turns[: turn + 1]
    parent = (turn - 1, start) if turn else None
    return OpenedContext(turn, token_ids[start : edges[-1]], star, edges, parent)
