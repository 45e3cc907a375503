"""A config.json means to us what it means to transformers, however odd it is; or it is refused by name."""

import json
import random
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor,
)
from megatron_ranks import logits_of
from random_models import CONFIGS, LLAMAS, hf_logits, random_token_ids
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.random_models import save_random_model
from checkpoints_tools import convert_hf_to_megatron
from checkpoints_tools.families import FAMILIES
from checkpoints_tools.families.missing import MISSING
from checkpoints_tools.hf_config import model_arguments
from megatron_star.model.checked_values import CheckedValues
from megatron_star.model.rotary_frequencies import rotary_frequencies

ABSENT = object()
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_TWO_KINDS = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 9,
}


def edit_config(hf: Path, changes: dict) -> None:
    config = json.loads((hf / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ABSENT}
    (hf / "config.json").write_text(json.dumps(config))


ODD = {
    "rope_scaling beside rope_parameters, as Qwen's README says": ("qwen2", {"rope_scaling": _YARN}),
    "rope_scaling with a base of its own": ("qwen3", {"rope_scaling": _YARN | {"rope_theta": 500.0}}),
    "the base of rope_parameters is lost beside rope_scaling": (
        "qwen2_yarn",
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 77.0},
    ),
    "original_max_position_embeddings at top level": (
        "qwen2_yarn",
        {"original_max_position_embeddings": 128},
    ),
    "original_max_position_embeddings nowhere": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "the factor of yarn is null": (
        "qwen2",
        {"rope_parameters": _YARN | {"factor": None, "rope_theta": 1e4}},
    ),
    "yarn with a factor below 1": ("llama2", {"rope_parameters": _YARN | {"factor": 0.5, "rope_theta": 1e4}}),
    "type is an older name of rope_type": (
        "llama2",
        {"rope_parameters": None, "rope_theta": 300.0, "rope_scaling": _YARN | {"type": "yarn"}},
    ),
    "mixtral without rope_theta": ("mixtral", {"rope_parameters": ABSENT}),
    "mixtral without an epsilon": ("mixtral", {"rms_norm_eps": ABSENT}),
    "llama without rope_theta": ("llama3_scaled", {"rope_parameters": ABSENT}),
    "a sliding window that begins behind the last layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3, "layer_types": ABSENT},
    ),
    "a sliding window as long as the context": ("mistral", {"sliding_window": 512}),
    "a dense Granite 4 with rotary embedding": ("granite4_dense", {"position_embedding_type": "rope"}),
    "swish is silu": ("llama_tied", {"hidden_act": "swish"}),
    "gemma 2 has its activation under another name": ("gemma2", {"hidden_act": "gelu"}),
    "gemma 3 in the spelling of its authors": (
        "gemma3_text",
        {
            "rope_parameters": ABSENT,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "layer_types": ABSENT,
            "sliding_window_pattern": 2,
            "_sliding_window_pattern": ABSENT,
        },
    ),
    "one expert, whose weight is 1": ("mixtral", {"num_experts_per_tok": 1}),
    "qwen3 without head_dim has heads of 128": ("qwen3", {"head_dim": ABSENT}),
}


@pytest.mark.parametrize("name, changes", ODD.values(), ids=ODD)
def test_an_odd_configuration_gives_the_logits_of_transformers(tmp_path, name, changes):
    config = CONFIGS[name]
    if changes.get("head_dim") is ABSENT:
        config = type(config)(**config.to_dict() | {"head_dim": 128})
    save_random_model(config, tmp_path / "hf")
    edit_config(tmp_path / "hf", changes)
    convert_hf_to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    token_ids = random_token_ids()
    [found] = run_ranks(1, logits_of, str(tmp_path / "megatron"), token_ids, 1)
    torch.testing.assert_close(found, hf_logits(tmp_path / "hf", token_ids), rtol=0, atol=1e-4)


def test_an_empty_quantization_config_says_nothing():
    config = json.loads(CONFIGS["llama_tied"].to_json_string())
    assert model_arguments(config | {"quantization_config": {}}) == model_arguments(config)


REFUSED = {
    "factors of Phi-3 that fit no head": (
        "phi3_longrope",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factor",
    ),
    "several rotary bases in layers of a kind": (
        "granite_swa",
        {"layer_rope_theta": [10000.0, 500.0, 400.0]},
        "layer_rope_theta=[10000.0, 500.0, 400.0]",
    ),
    "rotary bases for other layers": ("granite_swa", {"layer_rope_theta": [500.0]}, "layer_rope_theta"),
    "scaling beside several rotary bases": (
        "granite_swa",
        {"rope_scaling": _YARN | {"rope_theta": 1e4}},
        "rope_parameters",
    ),
    "dynamic scaling of Phi-3": (
        "phi3",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "transformers does not accept it",
    ),
    "queries that are not scaled": (
        "ministral3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "llama_4_scaling_beta",
    ),
    "scaling in the window layers of OLMo 3": (
        "olmo3",
        {
            "rope_parameters": {
                "sliding_attention": _YARN | {"rope_theta": 1e4},
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        "sliding_attention",
    ),
    "norms of each head of Command R+": ("cohere", {"use_qk_norm": True}, "use_qk_norm=True"),
    "norms of each head of StableLM": ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True"),
    "a hybrid of Granite 4": (
        "granite4_dense",
        {"layer_types": ["full_attention", "linear_attention"]},
        "layer_types has 'linear_attention'",
    ),
    "experts of Granite 4": ("granite4_dense", {"num_local_experts": 4}, "num_local_experts=4"),
    "positions of Granite 4": (
        "granite4_dense",
        {"position_embedding_type": "learned"},
        "position_embedding_type='learned'",
    ),
    "rotated layers of another number": ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]"),
    "windows that some of transformers' kernels do not see": (
        "smollm3",
        {"use_sliding_window": False},
        "use_sliding_window=False",
    ),
    "a multiplier of nothing": ("granite", {"residual_multiplier": 0.0}, "residual_multiplier=0.0"),
    "a kind of layer": (
        "qwen3",
        {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
        "layer_types",
    ),
    "an attention factor that Megatron cannot have": (
        "qwen2",
        {"rope_scaling": _YARN | {"factor": 1.0, "attention_factor": 1.3}},
        "attention_factor=1.3",
    ),
    "no rotary embedding for a kind of layer": (
        "qwen3",
        {
            **_TWO_KINDS,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
        "rope_parameters",
    ),
    "windows whose rotary embedding is scaled in another way": (
        "qwen3",
        {
            **_TWO_KINDS,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                "sliding_attention": _YARN | {"rope_theta": 1e4},
            },
        },
        "rope_parameters: sliding_attention: rope_type 'yarn'",
    ),
    "rotary embeddings for kinds of layers that nobody names": (
        "llama2",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "rope_parameters",
    ),
    "no causal mask": ("llama2", {"is_causal": False}, "is_causal=False"),
    "queries and keys that are clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    "biases of ERNIE beside experts": ("ernie4_5_moe", {"use_bias": True}, "use_bias=True"),
    "weights of experts with a least sum": ("ernie4_5_moe", {"moe_norm_min": 0.5}, "moe_norm_min=0.5"),
    "experts that all are dense": ("ernie4_5_moe", {"moe_layer_interval": 0}, "moe_layer_interval=0"),
    "groups by more than their best two": (
        "glm4_moe_groups",
        {"num_experts_per_tok": 6},
        "num_experts_per_tok=6",
    ),
    "experts with another activation": ("qwen2_moe", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "more experts than there are": ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok=5"),
    "heads that are no groups": ("llama2", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    "no heads": ("llama2", {"num_attention_heads": 0}, "num_attention_heads=0"),
    "a number that is none": ("llama2", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    "an odd head": ("qwen3", {"head_dim": 15}, "head_dim"),
    "several experts with sigmoids": (
        "llama4_text_experts",
        {"num_experts_per_tok": 2},
        "num_experts_per_tok=2",
    ),
    "another activation than xIELU": ("apertus", {"hidden_act": "silu"}, "hidden_act='silu'"),
    "a base that changes with the length": (
        "hunyuan_v1_dense",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type 'dynamic'",
    ),
    "a gate of another slope": ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5"),
    "experts with biases and attention without": (
        "gpt_oss",
        {"attention_bias": False},
        "attention_bias=False",
    ),
    "an activation": ("arcee", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
    "text for a size": ("llama2", {"hidden_size": "72"}, "hidden_size='72'"),
    "a base of null": ("llama2", {"rope_scaling": {"rope_theta": None}}, "rope_theta=None"),
    "layers without end": ("llama2", {"num_hidden_layers": 2**30}, "num_hidden_layers"),
    "a model that sees what comes after": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=True",
    ),
    "a soft cap that transformers does not use": (
        "gemma3_text",
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping=50.0",
    ),
}


@pytest.mark.parametrize("name, changes, word", REFUSED.values(), ids=REFUSED)
def test_what_megatron_would_compute_otherwise_is_refused_by_name(name, changes, word):
    config = json.loads(CONFIGS[name].to_json_string()) | changes
    with pytest.raises(ValueError, match="config.json: ") as error:
        model_arguments({key: value for key, value in config.items() if value is not ABSENT})
    assert word in str(error.value) and "\n" not in str(error.value)


WINDOWED = {
    "a window that is not in the file": (
        "mistral",
        {"sliding_window": ABSENT, "max_position_embeddings": 8192},
        ([4095, 0], [1, 1, 1]),
    ),
    "a window longer than the maximum before YaRN": (
        "mistral",
        {"sliding_window": 600, "rope_scaling": _YARN | {"original_max_position_embeddings": 512}},
        ([599, 0], [1, 1, 1]),
    ),
    "a window of experts": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 8},
        ([7, 0], [1, 1, 1]),
    ),
    "a window from a layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": ABSENT},
        ([7, 0], [0, 1, 1]),
    ),
    "windows of layer_types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        ([7, 0], [0, 1, 0]),
    ),
    "a window that is not used": ("qwen3", {"sliding_window": 8}, (None, None)),
}


@pytest.mark.parametrize("name, changes, expected", WINDOWED.values(), ids=WINDOWED)
def test_layers_have_the_windows_that_transformers_gives_them(name, changes, expected):
    config = json.loads(CONFIGS[name].to_json_string()) | changes
    args = model_arguments({key: value for key, value in config.items() if value is not ABSENT})
    assert (args.get("window_size"), args.get("window_attn_skip_freq")) == expected


# What is for training, for generating, or what transformers has resolved into another key.
WITHOUT_EFFECT = {
    *("attention_dropout", "residual_dropout", "embedding_dropout", "initializer_range", "eod_token_id"),
    "ignore_keys_at_rope_validation",
    *("no_rope_layer_interval", "interleave_moe_layer_step"),  # into no_rope_layers and moe_layers
    *("router_aux_loss_coef", "router_jitter_noise"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_router_logits", "pretraining_tp"),
    *("max_window_layers", "use_sliding_window", "sliding_window"),  # into layer_types; else it is read
    *("sliding_window_pattern", "_sliding_window_pattern"),  # the same
    *("resid_pdrop", "embd_pdrop", "hidden_dropout", "no_rope_layer_interval"),
    "original_max_position_embeddings",  # into rope_parameters
    *("qk_head_dim", "num_mtp_layers", "num_nextn_predict_layers"),  # a sum; layers that are left out
    *("embedding_initializer_range", "topk_method"),  # topk_method: also read, and refused
    *("layers_block_type", "num_experts_per_tok", "time_step_limit"),  # of no layer that is supported
    *(f"mamba_{what}" for what in ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand")),
    *(f"mamba_{what}" for what in ("chunk_size", "conv_bias", "proj_bias")),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_what_is_not_run_since_it_is_llama_is_llama(name):
    assert MODEL_FOR_CAUSAL_LM_MAPPING[type(CONFIGS[name])] is LlamaForCausalLM


def test_no_family_is_both_supported_and_refused():
    assert not FAMILIES.keys() & MISSING.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_a_family_is_read_or_refused_or_has_no_effect(monkeypatch, family):
    config_type = FAMILIES[family].config_type
    config = next(config for config in CONFIGS.values() if config.model_type == config_type)
    looked_at, look_up = set(), CheckedValues.any
    monkeypatch.setattr(
        CheckedValues, "any", lambda self, key, *default: looked_at.add(key) or look_up(self, key, *default)
    )
    model_arguments(json.loads(config.to_json_string()))
    keys = vars(CONFIG_MAPPING[config_type]()).keys() - vars(PreTrainedConfig()).keys()
    assert keys - looked_at - FAMILIES[family].neutral.keys() - WITHOUT_EFFECT == set()


def random_rope(draw: random.Random) -> dict:
    """Keys of a rotary embedding at random places, in random spellings."""
    rope = {draw.choice(["rope_type", "type"]): draw.choice(["default", "linear", "yarn", "llama3"])}
    values = {
        "factor": (2.0, 8.0, 1.0, 0.5, None),
        "original_max_position_embeddings": (8192, 64),
        "rope_theta": (500.0, 1e6),
        "attention_factor": (1.3, 0.9, 1.0, None),
        "beta_fast": (16, 0, None),
        "beta_slow": (2.5,),
        "mscale": (0.7, 1.0, 0),
        "mscale_all_dim": (1.2, 0.0),
        "truncate": (False, True),
        "low_freq_factor": (1.0, 0.5),
        "high_freq_factor": (4.0, 4, 7.5),
        "partial_rotary_factor": (1.0, 0.5, 0.3),
    }
    rope |= {key: draw.choice(of_key) for key, of_key in values.items() if draw.random() < 0.6}
    config = {draw.choice(["rope_parameters", "rope_scaling"]): rope}
    if draw.random() < 0.2:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    for key, of_key in (("rope_theta", (2e4,)), ("original_max_position_embeddings", (8192, 128))):
        if draw.random() < 0.3:
            config[key] = draw.choice(of_key)
    return config


def test_random_rotary_configurations_rotate_as_transformers_rotates(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    draw = random.Random(0)
    base = json.loads(CONFIGS["llama2"].to_json_string())
    del base["rope_parameters"]
    accepted = 0
    for _ in range(400):
        config = base | random_rope(draw)
        try:
            args = model_arguments(config)
        except ValueError as error:
            assert str(error).startswith("config.json: "), config
            continue
        accepted += 1
        theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**config))
        assert torch.equal(rotary_frequencies(args), theirs.inv_freq), config
        scale = 1.0
        if args["position_embedding_type"] == "yarn":
            scales = (args[name] for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim"))
            scale = _yarn_get_concentration_factor(*scales)
        assert scale == pytest.approx(theirs.attention_scaling, rel=1e-9), config
    assert accepted > 100
