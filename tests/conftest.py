"""Importable helpers, and checkpoints: of small random models, made once a session, and SmolLM2."""

import signal
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

REPOSITORY = Path(__file__).parents[1]
TESTS = REPOSITORY / "tests"
sys.path[:0] = [str(REPOSITORY), str(TESTS), str(TESTS / "checkpoints")]

from models import MODELS  # noqa: E402
from pair import Pair  # noqa: E402
from random_models import CONFIGS  # noqa: E402
from small_tokenizers import small_tokenizer  # noqa: E402

from benchmarks.random_models import save_random_model  # noqa: E402
from checkpoints_tools.convert_hf_to_megatron import convert  # noqa: E402

DEMO = REPOSITORY / ".demo"

# A shell starts what it runs in the background with Ctrl-C ignored, which the ranks that tests start inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Callable[[str], Pair]:
    """Gives the pair of a name in `models.MODELS`."""

    @cache
    def make(name: str) -> Pair:
        return _converted(MODELS[name], tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Callable[[str], Pair]:
    """The same of a name in `random_models.CONFIGS`, where every family has one."""

    @cache
    def make(name: str) -> Pair:
        return _converted(CONFIGS[name], tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def converted_with_tokenizer(tmp_path_factory) -> Callable[[str], Pair]:
    """The same with a small tokenizer and room for long texts: what a program needs to answer a question."""

    @cache
    def make(name: str) -> Pair:
        tokenizer, config = small_tokenizer("byte_level"), deepcopy(CONFIGS[name])
        config.vocab_size, config.max_position_embeddings = len(tokenizer), 4096
        return _converted(config, tmp_path_factory.mktemp(name), tokenizer)

    return make


def _converted(
    config: PreTrainedConfig, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Pair:
    pair = Pair(directory / "hf", directory / "megatron")
    save_random_model(config, pair.hf)
    if tokenizer:
        tokenizer.save_pretrained(pair.hf)
    convert(*pair)
    return pair


@pytest.fixture(scope="session")
def smollm2() -> Pair:
    """SmolLM2-135M-Instruct, as `make demo` made it."""
    pair = Pair(DEMO / "hf", DEMO / "megatron")
    if not pair.megatron.is_dir():
        pytest.fail("run `make test`, which makes .demo/hf and .demo/megatron, or deselect: -m 'not smollm2'")
    return pair
