"""What a layer does to queries and keys by their positions is what transformers' own code does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from distributed import run_ranks
from rotary_ranks import queries_and_keys_of_layers
from torch import Tensor
from transformers import (
    Cohere2Config,
    Gemma3TextConfig,
    Glm4Config,
    HunYuanDenseV1Config,
    Llama4TextConfig,
    LlamaConfig,
    Ministral3Config,
    NemotronConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
)
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.glm4 import modeling_glm4
from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense
from transformers.models.llama import modeling_llama
from transformers.models.llama4 import modeling_llama4
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.nemotron import modeling_nemotron
from transformers.models.olmo3 import modeling_olmo3
from transformers.models.phi3 import modeling_phi3

from checkpoints_tools.families.rotary_arguments import query_scale_arguments, rotary_arguments
from megatron_star.model.checked_values import CheckedValues

POSITIONS = [0, 1, 7, 8, 9, 4095, 4096, 20_000, 131_071, 999_999]
_SIZES = {
    "hidden_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "vocab_size": 128,
    "intermediate_size": 8,
    "pad_token_id": None,
}
_WINDOWS = {"window_size": [8, 0], "window_attn_skip_freq": [1, 0, 1, 0]}
_KINDS = ["sliding_attention", "full_attention"] * 2
_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 5e5}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.5, 2.1, 3.0, 4.7],
    "long_factor": [1.1, 2.0, 5.0, 9.5, 20.0, 48.0],
    "partial_rotary_factor": 0.5,
}
_PHI3 = {**_SIZES, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0, "max_position_embeddings": 8192}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e5,
    "factor": 16.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 7.0,
    "original_max_position_embeddings": 256,
}


class Case(NamedTuple):
    """A configuration, transformers' module of its model, and what its family says besides."""

    config: PreTrainedConfig
    rotary: type[torch.nn.Module]
    apply: Callable[..., tuple[Tensor, Tensor]]
    options: dict[str, bool]
    args: dict[str, Any]


def case(module: Any, config: PreTrainedConfig, options: dict[str, bool] | None = None, **args: Any) -> Case:
    name = next(n for n in vars(module) if n.endswith("RotaryEmbedding") and "Vision" not in n)
    apply = getattr(module, "apply_rotary_pos_emb", None) or module.apply_rotary_emb
    return Case(config, getattr(module, name), apply, options or {}, args)


CASES = {
    "plain": case(modeling_llama, LlamaConfig(**_SIZES, rope_parameters={"rope_theta": 1e6})),
    "linear": case(
        modeling_llama,
        LlamaConfig(**_SIZES, rope_parameters={"rope_type": "linear", "factor": 7.0, "rope_theta": 1e4}),
    ),
    "llama 3 with other constants": case(modeling_llama, LlamaConfig(**_SIZES, rope_parameters={**_LLAMA3})),
    "interleaved": case(modeling_cohere2, Cohere2Config(**_SIZES, rope_theta=5e4), rotary_interleaved=True),
    "a part of the head": case(
        modeling_nemotron, NemotronConfig(**_SIZES, partial_rotary_factor=0.4), {"reads_partial": True}
    ),
    "interleaved part of the head, YaRN": case(
        modeling_glm4,
        Glm4Config(**_SIZES, rope_parameters={**_YARN}, partial_rotary_factor=0.5),
        {"reads_partial": True},
        rotary_interleaved=True,
    ),
    "two bases, one scaled linearly": case(
        modeling_gemma3,
        Gemma3TextConfig(
            **_SIZES,
            layer_types=_KINDS,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        **_WINDOWS,
    ),
    "two rotary embeddings of one base, one with YaRN": case(
        modeling_olmo3,
        Olmo3Config(
            **_SIZES,
            layer_types=_KINDS,
            rope_parameters={
                "full_attention": {**_YARN},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        ),
        **_WINDOWS,
    ),
    "a base changed by alpha": case(
        modeling_hunyuan_v1_dense,
        HunYuanDenseV1Config(**_SIZES, rope_parameters={"rope_type": "dynamic", "factor": 1.0, "alpha": 1e3}),
        {"reads_alpha": True},
    ),
    "longrope, a part of the head": case(
        modeling_phi3,
        Phi3Config(**_PHI3, rope_parameters={**_LONGROPE}, original_max_position_embeddings=512),
        {"reads_partial": True},
    ),
    "layers that are not rotated, with scaled queries": case(
        modeling_llama4,
        Llama4TextConfig(**_SIZES, no_rope_layers=[1, 0, 1, 0], floor_scale=8, rope_parameters={**_LLAMA3}),
        rotary_interleaved=True,
        no_rope_freq=[0, 1, 0, 1],
        query_scale_beta=0.1,
        query_scale_floor=8,
        query_scale_offset=1,
        query_scale_layers=[0, 1, 0, 1],
    ),
    "scaled queries in all layers": case(
        modeling_ministral3,
        Ministral3Config(**_SIZES, rope_parameters=_YARN | {"mscale": 1.0, "llama_4_scaling_beta": 0.1}),
    ),
}


def arguments(case: Case) -> dict[str, Any]:
    """Megatron's, of a small model."""
    case.config.standardize_rope_params()
    values = CheckedValues(vars(case.config), "config.json")
    scaled = "llama_4_scaling_beta" in case.config.rope_parameters
    return {
        "num_layers": 4,
        "hidden_size": 72,
        "ffn_hidden_size": 8,
        "num_attention_heads": 3,
        "num_query_groups": 1,
        "group_query_attention": True,
        "kv_channels": 24,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "add_bias_linear": False,
        "padded_vocab_size": 128,
        "untie_embeddings_and_output_weights": False,
        **rotary_arguments(values, **case.options),
        **(query_scale_arguments(values) if scaled else {}),
        **case.args,
    }


def of_transformers(
    case: Case, layer: int, query: Tensor, key: Tensor, positions: list[int] = POSITIONS
) -> tuple[Tensor, Tensor]:
    """[1, heads, sq, hn] as transformers' layer would attend with them."""
    positions = torch.tensor([positions])
    if case.rotary is modeling_llama4.Llama4TextRotaryEmbedding:
        if not case.args["no_rope_freq"][layer]:
            both = case.apply(
                query.transpose(1, 2), key.transpose(1, 2), case.rotary(case.config)(query, positions)
            )
            return both[0].transpose(1, 2), both[1].transpose(1, 2)
        config = case.config  # as in the middle of Llama4TextAttention.forward
        scales = torch.log1p(torch.floor((positions.float() + 1.0) / config.floor_scale)) * config.attn_scale
        return query * (scales + 1.0).view(1, 1, -1, 1), key
    kinds = [_KINDS[layer]] if "full_attention" in case.config.rope_parameters else []
    query, key = case.apply(query, key, *case.rotary(case.config)(query, positions, *kinds))
    if case.rotary is modeling_ministral3.Ministral3RotaryEmbedding:
        rope = case.config.rope_parameters
        query = query * modeling_ministral3.get_llama_4_attn_scale(
            positions, rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        )
    return query, key


@pytest.mark.parametrize("name", CASES)
def test_queries_and_keys_of_every_layer_are_those_of_transformers(name):
    query, key = torch.randn(len(POSITIONS), 1, 3, 24), torch.randn(len(POSITIONS), 1, 1, 24)
    is_long = (name.startswith("longrope"),)  # the last position is behind the original length
    (layers,) = run_ranks(
        1, queries_and_keys_of_layers, arguments(CASES[name]), POSITIONS, query, key, is_long
    )
    assert len(layers) == 4
    for layer, found in enumerate(layers):
        expected = of_transformers(CASES[name], layer, query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.permute(1, 2, 0, 3), other, atol=1e-5, rtol=0)


def test_each_row_of_longrope_has_the_factors_of_its_own_sequence():
    """The first three are of a sequence within the original length, those behind them of a longer one."""
    case, count = CASES["longrope, a part of the head"], len(POSITIONS)
    query, key = torch.randn(count, 1, 3, 24), torch.randn(count, 1, 1, 24)
    long_rows = [False] * 3 + [True] * (count - 3)
    (layers,) = run_ranks(1, queries_and_keys_of_layers, arguments(case), POSITIONS, query, key, long_rows)
    for rows in (slice(3), slice(3, None)):
        one = query[rows].permute(1, 2, 0, 3), key[rows].permute(1, 2, 0, 3)
        expected = of_transformers(case, 0, *one, POSITIONS[rows])
        for found, other in zip(layers[0], expected, strict=True):
            torch.testing.assert_close(found[rows].permute(1, 2, 0, 3), other, atol=1e-5, rtol=0)
