"""Checkpoints that several tests read; each is made once per session."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from random_models import CONFIGS

from benchmarks.random_models import save_random_model
from checkpoints_tools import convert_hf_to_megatron

_DEMO = Path(__file__).parents[2] / ".demo"


class Pair(NamedTuple):
    """A Hugging Face checkpoint and the Megatron checkpoint made of it."""

    hf: Path
    megatron: Path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Gives the pair of a name in `random_models.CONFIGS`."""
    root = tmp_path_factory.mktemp("converted")

    def pair(name: str) -> Pair:
        made = Pair(root / name / "hf", root / name / "megatron")
        if not made.megatron.exists():
            save_random_model(CONFIGS[name], made.hf)
            convert_hf_to_megatron.convert(made.hf, made.megatron)
        return made

    return pair


@pytest.fixture(scope="session")
def smollm2() -> Pair:
    """SmolLM2, as `make demo` made it."""
    pair = Pair(_DEMO / "hf", _DEMO / "megatron")
    if not pair.megatron.is_dir():
        pytest.fail("run `make test`, which makes .demo/hf and .demo/megatron, or deselect: -m 'not smollm2'")
    return pair
