"""A small random model that four ranks can share as TP 2 x CP 2, with the tokenizer of another.

python tests/slurm/random_model.py TOKENIZER_DIRECTORY OUTPUT
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def save_random_model(tokenizer_directory: Path, output: Path) -> None:
    """Write a Hugging Face checkpoint; the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer_directory)),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    LlamaForCausalLM(config).save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_directory / name, output)


if __name__ == "__main__":
    save_random_model(Path(sys.argv[1]), Path(sys.argv[2]))
