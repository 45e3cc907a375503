"""A small random model that four ranks can share as TP 2 x CP 2, with the tokenizer of another.

python tests/slurm/random_model.py TOKENIZER_DIRECTORY OUTPUT
"""

import shutil
import sys
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig

from benchmarks.random_models import save_random_model


def save_with_tokenizer(tokenizer_directory: Path, output: Path) -> None:
    """Write a Hugging Face checkpoint; the same at every call."""
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer_directory)),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    save_random_model(config, output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_directory / name, output)


if __name__ == "__main__":
    save_with_tokenizer(Path(sys.argv[1]), Path(sys.argv[2]))
