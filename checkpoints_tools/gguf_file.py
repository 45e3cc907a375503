"""A GGUF file of the Llama architecture: fields and tensors, and the refusal of what is not understood."""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from checkpoints_tools.casting import cast
from checkpoints_tools.chunks import HfTensor
from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues

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
_MODEL_FIELDS = frozenset(
    "llama." + name
    for name in (
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    )
)
# Of the tokenizer what is read, and names of tokens that nothing asks for.
_TOKENIZER_FIELDS = frozenset(
    "tokenizer." + name
    for name in (
        "chat_template",
        "ggml.add_bos_token",
        "ggml.bos_token_id",
        "ggml.eom_token_id",
        "ggml.eos_token_id",
        "ggml.eot_token_id",
        "ggml.fim_mid_token_id",
        "ggml.fim_pad_token_id",
        "ggml.fim_pre_token_id",
        "ggml.fim_rep_token_id",
        "ggml.fim_sep_token_id",
        "ggml.fim_suf_token_id",
        "ggml.mask_token_id",
        "ggml.merges",
        "ggml.middle_token_id",
        "ggml.model",
        "ggml.padding_token_id",
        "ggml.pre",
        "ggml.prefix_token_id",
        "ggml.scores",
        "ggml.seperator_token_id",
        "ggml.suffix_token_id",
        "ggml.token_type",
        "ggml.tokens",
        "ggml.unknown_token_id",
    )
)
# How the file came about: of no effect on what the model computes.
_DESCRIPTIVE = ("GGUF.", "general.", "quantize.")
# What may only have this value.
_NEUTRAL = {
    "general.architecture": "llama",
    "general.type": "model",
    "llama.attention.causal": True,
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.rope.scale_linear": 1.0,
    "llama.rope.scaling.type": "none",
    "split.count": 1,
    "split.no": 0,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_sep_token": False,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.remove_extra_whitespaces": False,
}


class GgufFile:
    """The fields and tensors of a file.

    Attributes:
        fields: their values, by name.
        tensors: by the name that they have in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not GGUF, or another architecture, or has a field or tensor that is not understood.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            reader = gguf.GGUFReader(path)
            values = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # whatever the gguf package raises on these bytes is about these bytes
            raise ValueError(f"{path}: not a whole GGUF file ({type(error).__name__}: {error})") from error
        self.fields = CheckedValues(values, path)
        self.tensors: dict[str, gguf.ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        for name in values:
            self._refuse_unless_understood(name)
        for name in self.tensors:
            self.hf_name(name)

    def _refuse_unless_understood(self, name: str) -> None:
        if name in _NEUTRAL:
            self.fields.one_of(name, (_NEUTRAL[name],))
        elif name not in _MODEL_FIELDS | _TOKENIZER_FIELDS and not name.startswith(_DESCRIPTIVE):
            raise ValueError(f"{self.path}: {name}={shown(self.fields.any(name))} is not supported")

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a tensor; ValueError if it has none."""
        if name in _NAMES:
            return _NAMES[name]
        block, _, rest = name.partition(".")[2].partition(".")
        if name.startswith("blk.") and rest in _NAMES_IN_LAYER:
            return f"model.layers.{block}.{_NAMES_IN_LAYER[rest]}"
        raise ValueError(f"{self.path}: the tensor {name} is not supported")

    def hf_tensor(self, name: str) -> HfTensor:
        """Name and shape in Hugging Face's order."""
        return HfTensor(self.hf_name(name), tuple(reversed(self.tensors[name].shape.tolist())))

    def read(self, name: str, num_heads: int | None) -> Tensor:
        """A tensor, see `read_tensor`; ValueError if it cannot be dequantised or is not all numbers."""
        try:
            values = read_tensor(self.tensors[name], num_heads)
        except Exception as error:  # as above: of the package, about these bytes
            kind = self.tensors[name].tensor_type
            raise ValueError(
                f"{self.path}: {name} of type {kind!r} cannot be dequantised ({error})"
            ) from error
        return cast(values, torch.float32, f"{self.path}: {name}")


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
