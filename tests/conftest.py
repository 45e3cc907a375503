"""Importable helpers, and checkpoints: of small random models, made once a session, and SmolLM2."""

import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

from models import MODELS  # noqa: E402

from benchmarks.random_models import save_random_model  # noqa: E402
from checkpoints_tools.convert_hf_to_megatron import convert  # noqa: E402

DEMO = REPOSITORY / ".demo"

# A shell starts what it runs in the background with Ctrl-C ignored, which the ranks that tests start inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """By name: the folders of a Hugging Face checkpoint and of its Megatron conversion."""

    @cache
    def make(name: str) -> tuple[Path, Path]:
        directory = tmp_path_factory.mktemp(name)
        save_random_model(MODELS[name], directory / "hf")
        convert(directory / "hf", directory / "megatron")
        return directory / "hf", directory / "megatron"

    return make


@pytest.fixture(scope="session")
def smollm2() -> tuple[Path, Path]:
    """Folders of SmolLM2-135M-Instruct, Hugging Face and Megatron."""
    if not (DEMO / "megatron").is_dir():
        pytest.fail(f"{DEMO}/megatron is missing: `make test` makes it")
    return DEMO / "hf", DEMO / "megatron"
