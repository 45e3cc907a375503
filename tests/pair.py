"""A model as transformers has it, and converted."""

from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """The folders of one model."""

    hf: Path
    megatron: Path
