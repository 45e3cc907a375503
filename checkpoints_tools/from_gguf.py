"""Turn a GGUF file of a Llama model into a Hugging Face directory (float32, dequantised).

python -m checkpoints_tools.from_gguf FILE --output DIR
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints_tools.chunks import chunks
from checkpoints_tools.command_line import command_parser, progress_bar, run_command
from checkpoints_tools.families.llama import LLAMA
from checkpoints_tools.gguf_file import GgufFile
from checkpoints_tools.gguf_tokenizer import write_tokenizer
from checkpoints_tools.hf_config import model_arguments
from checkpoints_tools.output import check_can_write, new_directory
from checkpoints_tools.safetensors_output import Written, write_hf_weights

_END_TOKENS = ("eos", "eot", "eom")  # of a text, of a turn, of a message
_HEADS_OF = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}


def hf_config(file: GgufFile) -> dict[str, Any]:
    """config.json of the model in the file.

    Raises:
        ValueError: a field is missing, or says something that Llama models do not do.
    """
    fields = file.fields
    heads, hidden = fields.integer("llama.attention.head_count"), fields.integer("llama.embedding_length")
    head_size = fields.integer("llama.attention.key_length", default=hidden // heads)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        fields.one_of(name, (head_size,), head_size)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{file.path}: token_embd.weight is missing or has no rows")
    vocab_size = int(embedding.shape[1])
    fields.one_of("llama.vocab_size", (vocab_size,), vocab_size)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": LLAMA.model_type,
        "hidden_size": hidden,
        "intermediate_size": fields.integer("llama.feed_forward_length"),
        "num_hidden_layers": fields.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("llama.attention.head_count_kv", default=heads),
        "head_dim": head_size,
        "max_position_embeddings": fields.integer("llama.context_length"),
        "rms_norm_eps": _shortest_float(fields.number("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest_float(fields.number("llama.rope.freq_base", default=10000.0)),
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **_token_ids(file, vocab_size),
        "dtype": "float32",
    }


def _shortest_float(value: float) -> float:
    """GGUF holds float32: 9.999999747378752e-06 was 1e-05."""
    return float(str(np.float32(value)))


def _token_ids(file: GgufFile, vocab_size: int) -> dict[str, Any]:
    """The ids that config.json and generation_config.json name; of several that end an answer, a list."""

    def token_id(kind: str) -> int | None:
        name = f"tokenizer.ggml.{kind}_token_id"
        return file.fields.integer(name, least=0, most=vocab_size - 1, default=None)

    ends = list(dict.fromkeys(end for kind in _END_TOKENS if (end := token_id(kind)) is not None))
    return {
        "bos_token_id": token_id("bos"),
        "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_token_id": token_id("padding"),
    }


def _check_tensors(file: GgufFile, config: dict[str, Any]) -> None:
    """Every tensor of the configuration is there, in its shape, and no other; ValueError otherwise."""
    found = {tensor.name: tensor.shape for tensor in map(file.hf_tensor, file.tensors)}
    for piece in chunks(LLAMA, model_arguments(config)):
        for name, shape, _ in piece.sources:
            if name not in found:
                raise ValueError(f"{file.path}: {name} is missing; is this one of several files?")
            if found[name] != shape:
                raise ValueError(f"{file.path}: {name} has shape {found[name]}, the fields say {shape}")
            del found[name]
    if found:
        raise ValueError(f"{file.path}: {min(found)} belongs to no layer that the fields name")


def convert(path: Path, output: Path, *, force: bool = False) -> None:
    """Write the Hugging Face directory `output` from a GGUF file."""
    check_can_write(output, inputs=[path], force=force)
    file = GgufFile(path)
    config = hf_config(file)
    _check_tensors(file, config)
    tensors = map(file.hf_tensor, file.tensors)
    groups = [[Written(tensor.name, tensor.shape, torch.float32)] for tensor in tensors]
    num_bytes = sum(4 * int(tensor.n_elements) for tensor in file.tensors.values())
    with (
        new_directory(output, inputs=[path], force=force, num_bytes=num_bytes) as temporary,
        progress_bar(num_bytes, "dequantising") as bar,
    ):
        _write_tokenizer(file, temporary)
        write_hf_weights(temporary, groups, _values(file, config, bar))
        _write_json(temporary / "config.json", config)
        tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(temporary / "generation_config.json", tokens)


def _write_tokenizer(file: GgufFile, directory: Path) -> None:
    try:
        write_tokenizer(lambda name, default=None: file.fields.any(name, default), directory)
    except Exception as error:  # of the tokenizers package too, which raises bare ones on tokens and merges
        raise ValueError(f"{file.path}: its tokenizer cannot be read: {error}") from error


def _values(file: GgufFile, config: dict[str, Any], bar: Any) -> Iterator[list[Tensor]]:
    for name in file.tensors:
        heads = _HEADS_OF.get(name.partition(".")[2].partition(".")[2])
        value = file.read(name, config[heads] if heads else None)
        bar.update(value.nbytes)
        yield [value]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = command_parser("from_gguf", __doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument(
        "--force", action="store_true", help="replace an existing output, if it is a checkpoint of ours"
    )
    options = parser.parse_args()
    convert(options.file, options.output, force=options.force)
    print(f"{options.output} written")


if __name__ == "__main__":
    run_command(main)
