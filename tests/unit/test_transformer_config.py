"""Our fields of a model's configuration, and what a checkpoint's description may say in them."""

import copy
from dataclasses import fields

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from test_model import ARGS

from megatron_star.model.architecture import ModelParallelSizes, gpt_model_arguments, transformer_config
from megatron_star.model.recorded_arguments import check_arguments
from megatron_star.model.transformer_config import OWN_FIELDS, StarTransformerConfig, own_field

DESCRIPTION = ARGS | {
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "add_qkv_bias": False,
    "qk_layernorm": True,
    "untie_embeddings_and_output_weights": True,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "rotary_base": 10000.0,
    "rotary_percent": 1.0,
    "num_experts": None,
}
SAYS_SOMETHING = {
    "window_size": [7, 0],
    "window_attn_skip_freq": [1, 0],
    "softmax_type": "learnable",
    "softmax_scale": 0.3,
    "no_rope_freq": [0, 1],
    "attention_output_gate": True,
    "attention_chunk_size": 8,
    "chunked_layers": [0, 1],
    "attention_softcap": 50.0,
    "logits_softcap": 30,
    "window_rotary_base": 1e4,
    "norm_placement": "both",
    "norm_bias": False,
    "qk_layernorm_span": "all_heads",
    "add_proj_bias": True,
    "add_mlp_bias": True,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_multiplier": 0.125,
}


def config_of(**args) -> StarTransformerConfig:
    return transformer_config(
        ARGS | args, ModelParallelSizes(), dtype=torch.float32, device=torch.device("cpu")
    )


def test_what_a_description_says_is_in_the_configuration():
    check_arguments(DESCRIPTION | SAYS_SOMETHING, "source")
    config = config_of(qk_layernorm=True, **SAYS_SOMETHING)
    for name, value in SAYS_SOMETHING.items():
        assert getattr(config, name) == (tuple(value) if name == "window_size" else value), name
    assert config_of(apply_layernorm_1p=True).layernorm_zero_centered_gamma
    assert (
        gpt_model_arguments(DESCRIPTION | {"rotary_seq_len_interpolation_factor": 4.0})[
            "seq_len_interpolation_factor"
        ]
        == 4.0
    )


def test_a_description_without_our_names_is_plain_megatrons():
    config = config_of()
    check_arguments(DESCRIPTION, "source")
    check_arguments(DESCRIPTION | dict.fromkeys(SAYS_SOMETHING), "source")
    assert {name: getattr(config, name) for name in OWN_FIELDS} == {
        name: own.default for name, own in OWN_FIELDS.items()
    }
    plain = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    assert all(own_field(plain, name) == own.default for name, own in OWN_FIELDS.items())


def test_multipliers_change_nothing_else_that_mup_would():
    plain, multiplied = config_of(), config_of(embedding_multiplier=12.0, logits_multiplier=0.125)
    changed = {
        field.name
        for field in fields(StarTransformerConfig)
        if getattr(plain, field.name) != getattr(multiplied, field.name) and "init_method" not in field.name
    }
    assert changed == {
        *("embedding_multiplier", "logits_multiplier", "use_mup", "mup_embedding_mult", "mup_output_mult"),
        *("mup_base_hidden_size", "mup_attn_scale_power", "softmax_scale"),
    }
    assert multiplied.mup_width_mult == 1.0
    assert multiplied.softmax_scale == plain.kv_channels**-0.5, "what our core attention takes without it"
    assert config_of(embedding_multiplier=12.0, softmax_scale=0.3).softmax_scale == 0.3


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_an_activation_has_its_function_and_is_gated_as_said(activation, gated):
    config = copy.deepcopy(config_of(swiglu=False, activation=activation, gated_mlp=gated))
    values = torch.linspace(-3, 3, 7)
    expected = {
        "silu": values * values.sigmoid(),
        "gelu": values * 0.5 * (1 + torch.erf(values / 2**0.5)),
        "gelu_tanh": torch.nn.functional.gelu(values, approximate="tanh"),
        "relu2": values.clamp(min=0) ** 2,
    }
    torch.testing.assert_close(config.activation_func(values), expected[activation])
    assert config.gated_linear_unit is gated


@pytest.mark.parametrize(
    "name, value",
    [
        *(("window_size", value) for value in (7, [7], [7, 1], [-1, 0], [7.0, 0], "7", [True, 0])),
        *(("window_attn_skip_freq", value) for value in ([1], [1, 0, 1], [1, 2], 2, [True, False])),
        ("softmax_type", "sigmoid"),
        *(("softmax_scale", value) for value in (0.0, -1.0, float("nan"), float("inf"), True, "0.3")),
        ("no_rope_freq", [0]),
        ("attention_output_gate", 1),
        *(("attention_chunk_size", value) for value in (0, 7.5, True)),
        ("chunked_layers", [1]),
        ("chunked_layers", [1, 0]),  # that layer has a window
        *(("attention_softcap", value) for value in (0, -5.0, [50.0])),
        ("norm_placement", "between"),
        ("norm_bias", "no"),
        ("qk_layernorm_span", "all"),
        ("activation", "tanh"),
        ("activation", "silu"),  # together with swiglu
        ("gated_mlp", True),  # without an activation
        ("qk_layernorm_after_rotation", True),  # together with a norm over all heads
        ("qk_l2_norm", True),  # together with qk_layernorm
        ("qk_norm_of_rotated_only", "yes"),
        ("residual_multiplier", 0.0),
        ("embedding_multiplier", None.__class__),
        ("rotary_seq_len_interpolation_factor", 0),
        ("rotary_percent", 1.5),
        *(("longrope_short_factors", value) for value in ([1.0, 0.0], [True], "1", [1.0])),  # "rope" has none
        ("query_scale_offset", 2),
    ],
)
def test_a_value_of_another_type_or_out_of_bounds_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"source: {name}="):
        check_arguments(DESCRIPTION | SAYS_SOMETHING | {name: value}, "source")


def test_longrope_has_a_factor_for_each_pair_that_is_rotated():
    factors = {"longrope_short_factors": [1.0] * 4, "longrope_long_factors": [2.0] * 4}
    longrope = {
        "position_embedding_type": "longrope",
        "rotary_percent": 0.5,
        **factors,
        "longrope_original_max_position_embeddings": 64,
    }
    check_arguments(DESCRIPTION | longrope, "source")
    for name in factors:
        with pytest.raises(ValueError, match=f"{name}=.*: it must be 4 numbers, one for each pair"):
            check_arguments(DESCRIPTION | longrope | {name: [1.0] * 8}, "source")
    with pytest.raises(ValueError, match="longrope_short_factors=.*: it must be absent without"):
        check_arguments(DESCRIPTION | longrope | {"position_embedding_type": "rope"}, "source")


@pytest.mark.parametrize(
    "name, without",
    [
        ("window_attn_skip_freq", "window_size"),
        ("window_rotary_base", "window_size"),
        ("chunked_layers", "attention_chunk_size"),
        ("attention_chunk_size", "chunked_layers"),
        ("qk_layernorm_span", "qk_layernorm"),
        ("qk_layernorm_after_rotation", "qk_layernorm"),
    ],
)
def test_what_says_nothing_without_another_argument_is_refused(name, without):
    off = False if without == "qk_layernorm" else None
    with pytest.raises(ValueError, match=f"{name}=.*: it must be absent without {without}"):
        check_arguments(DESCRIPTION | {name: SAYS_SOMETHING.get(name, True), without: off}, "source")
