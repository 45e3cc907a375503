"""Turn a GGUF file of a Llama model into a Hugging Face directory (float32, dequantised).

python -m checkpoints_tools.from_gguf FILE --output DIR
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from checkpoints_tools.command_line import command_parser, progress_bar, run_command
from checkpoints_tools.families import HfTensor
from checkpoints_tools.gguf_tokenizer import write_tokenizer
from checkpoints_tools.output import check_can_write, new_directory
from checkpoints_tools.safetensors_files import write_hf_weights

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NAMES_IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# A file with these describes a model that config.json would have to say more about.
_REFUSED_FIELDS = ("llama.expert_count", "llama.rope.scaling.type", "llama.rope.scaling.factor")


class GgufFile:
    """The fields and tensors of a GGUF file of the Llama architecture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not GGUF, or another architecture, or uses what is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: not a whole GGUF file ({error})") from error
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._refuse_what_is_not_supported()

    def get(self, name: str, default: object = None) -> Any:
        """The value of a field."""
        return self.fields[name].contents() if name in self.fields else default

    def require(self, name: str) -> Any:
        """The value of a field; ValueError if it is missing."""
        if name not in self.fields:
            raise ValueError(f"{self.path}: the field {name} is missing")
        return self.get(name)

    def _refuse_what_is_not_supported(self) -> None:
        architecture = self.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{self.path}: architecture {architecture!r} is not supported; llama is")
        for name in _REFUSED_FIELDS:
            if name in self.fields:
                raise ValueError(f"{self.path}: {name}={self.get(name)!r} is not supported")
        for name in self.tensors:
            self.hf_name(name)

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a tensor; ValueError if it has none."""
        if name in _NAMES:
            return _NAMES[name]
        block, _, rest = name.partition(".")[2].partition(".")
        if name.startswith("blk.") and rest in _NAMES_IN_LAYER:
            return f"model.layers.{block}.{_NAMES_IN_LAYER[rest]}"
        raise ValueError(f"{self.path}: the tensor {name} is not supported")


def hf_config(file: GgufFile) -> dict[str, Any]:
    """config.json of the model in the file."""
    heads = file.require("llama.attention.head_count")
    hidden = file.require("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": file.require("llama.feed_forward_length"),
        "num_hidden_layers": file.require("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("llama.attention.head_count_kv", heads),
        "head_dim": file.get("llama.attention.key_length", hidden // heads),
        "max_position_embeddings": file.require("llama.context_length"),
        "rms_norm_eps": _shortest_float(file.require("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest_float(file.get("llama.rope.freq_base", 10000.0)),
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def _shortest_float(value: float) -> float:
    """GGUF holds float32: 9.999999747378752e-06 was 1e-05."""
    return float(str(np.float32(value)))


def read_tensor(tensor: gguf.ReaderTensor, num_heads: int | None) -> Tensor:
    """Dequantised to float32; query and key rows in Hugging Face's order.

    Args:
        num_heads: of a query or key weight, whose rows GGUF interleaves: (0, hn/2, 1, hn/2 + 1, ...).
    """
    values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    values = values.reshape(tuple(reversed(tensor.shape.tolist())))
    if num_heads is None:
        return values
    return values.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _num_heads(name: str, config: dict[str, Any]) -> int | None:
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
    key = heads.get(name.rpartition("blk.")[2].partition(".")[2])
    return config[key] if key else None


def convert(path: Path, output: Path, *, force: bool = False) -> None:
    """Write the Hugging Face directory `output` from a GGUF file."""
    check_can_write(output, force=force)
    file = GgufFile(path)
    config = hf_config(file)
    groups = [
        [HfTensor(file.hf_name(name), tuple(reversed(tensor.shape.tolist())))]
        for name, tensor in file.tensors.items()
    ]
    num_bytes = sum(4 * int(tensor.n_elements) for tensor in file.tensors.values())
    with (
        new_directory(output, force=force, num_bytes=num_bytes) as temporary,
        progress_bar(num_bytes, "dequantising") as bar,
    ):

        def values() -> Any:
            for name, tensor in file.tensors.items():
                value = read_tensor(tensor, _num_heads(name, config))
                bar.update(value.nbytes)
                yield [value]

        write_hf_weights(temporary, groups, values(), torch.float32)
        write_tokenizer(file.get, temporary)
        _write_json(temporary / "config.json", config)
        tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(temporary / "generation_config.json", tokens)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = command_parser("from_gguf", __doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    options = parser.parse_args()
    convert(options.file, options.output, force=options.force)


if __name__ == "__main__":
    run_command(main)
