"""EXAONE 3.0 and 3.5: Llama, whose tensors have other names."""

from dataclasses import replace

from checkpoints_tools.families.llama import LLAMA
from checkpoints_tools.families.weights import renamed

_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "self_attn.out_proj",
    "self_attn": "attn.attention",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "gate_proj": "c_fc_0",
    "up_proj": "c_fc_1",
    "down_proj": "c_proj",
}
[_EMBEDDING] = renamed((LLAMA.embedding,), _NAMES)
EXAONE = replace(
    LLAMA,
    model_type="exaone",
    bridge_provider=None,
    embedding=_EMBEDDING,
    layer=renamed(LLAMA.layer, _NAMES),
    end=renamed(LLAMA.end, _NAMES),
)
