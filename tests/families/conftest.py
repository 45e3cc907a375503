"""The small models of all families on grids of ranks; each grid runs a model once for all tests."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "distributed"))  # compiled_ranks

from distributed import run_ranks  # noqa: E402
from family_ranks import Answers, answers  # noqa: E402


@pytest.fixture(scope="session")
def answers_of(converted) -> Callable[[str, int, int], list[Answers]]:
    """Of every rank, by name of the model, TP size and CP size. Layers are compiled on two CP ranks only."""

    @cache
    def of(name: str, tp_size: int, cp_size: int) -> list[Answers]:
        with_compiled = (tp_size, cp_size) == (1, 2)
        return run_ranks(tp_size * cp_size, answers, str(converted(name).megatron), tp_size, with_compiled)

    return of
