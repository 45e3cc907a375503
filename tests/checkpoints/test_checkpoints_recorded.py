"""What was recorded with a model and changes its results is what we compute, or is refused by name."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import add_megatron_arguments
from random_models import CONFIGS
from small_arguments import arguments

from checkpoints_tools import recorded_by_megatron
from checkpoints_tools.hf_config import model_arguments
from megatron_star.model import recorded_arguments
from megatron_star.model.recorded_arguments import check_arguments

MODEL = arguments("qwen2")
EXPERTS = arguments("qwen3_moe")
SAME_FOR_ALL = [
    ("squared_relu", True),
    ("quick_geglu", True),
    ("apply_residual_connection_post_layernorm", True),
    ("experimental_attention_variant", "dsa"),
    ("linear_attention_freq", 4),
    ("mtp_num_layers", 1),
    ("use_mup", True),
    ("mrope_section", [16, 24, 24]),
    ("is_hybrid_model", True),
    ("heterogeneous_layers_config_path", "layers.json"),
    ("activation_func", "gelu"),
    ("embedding_multiplier_of_a_fork", 12.0),
]
COMPARED = [
    ("window_size", (128, 0)),
    ("window_size", [128, 0]),
    ("softmax_type", "learnable"),
    ("softmax_scale", 0.5),
    ("multi_latent_attention", True),
    ("no_rope_freq", 3),
    ("qk_l2_norm", True),
    ("attention_output_gate", True),
    ("rotary_seq_len_interpolation_factor", 4.0),
    ("glu_linear_offset", 1.0),
    ("activation_func_clamp_value", 7.0),
    ("norm_placement", "after"),
    ("rotary_interleaved", True),
    ("add_bias_linear", True),
    ("swiglu", False),
    ("rotary_percent", 0.5),
]
OF_EXPERTS = [
    ("moe_router_score_function", "sigmoid"),
    ("moe_router_topk_scaling_factor", 2.5),
    ("moe_router_enable_expert_bias", True),
    ("moe_router_num_groups", 2),
    ("moe_shared_expert_intermediate_size", 64),
    ("moe_expert_capacity_factor", 1.0),
    ("moe_apply_probs_on_input", True),
    ("moe_layer_freq", [0, 1, 1]),
    ("moe_router_load_balancing_type", "sinkhorn"),
    ("moe_router_load_balancing_type", ["aux_loss", "quantile_balancing"]),
]


def parsed_defaults() -> dict:
    """What Megatron-LM's own parser gives when no flag is set."""
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    return vars(parser.parse_args([]))


@pytest.fixture
def agree(monkeypatch):
    """Compares a model's arguments with the `args` that Megatron-LM would have recorded, and changes."""

    def check(model_args: dict, changes: dict) -> None:
        flags = {name: value for name, value in model_args.items() if name != "norm_epsilon"}
        recorded = parsed_defaults() | flags | {"layernorm_epsilon": model_args["norm_epsilon"]}
        state = {"args": argparse.Namespace(**recorded | changes)}
        monkeypatch.setattr(recorded_by_megatron, "load_common_state_dict", lambda path: state)
        found = recorded_by_megatron.recorded_arguments(Path("weights"))
        recorded_by_megatron.check_agreement(Path("checkpoint"), found, model_args)

    return check


@pytest.mark.parametrize("model_args", [MODEL, EXPERTS], ids=["dense", "experts"])
def test_the_defaults_of_megatrons_parser_and_the_model_itself_are_accepted(agree, model_args):
    agree(model_args, {"seq_length": 4096, "fp8": "hybrid", "recompute_granularity": "full", "bf16": True})
    agree(model_args, {"moe_router_load_balancing_type": "aux_loss", "window_size": None})
    agree(model_args, {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]})


@pytest.mark.parametrize("name, value", SAME_FOR_ALL + COMPARED)
def test_what_megatron_lm_recorded_and_we_do_not_compute_is_refused_by_name(agree, name, value):
    with pytest.raises(ValueError, match=name):
        agree(MODEL, {name: value})


@pytest.mark.parametrize("name, value", OF_EXPERTS)
def test_what_was_recorded_of_experts_counts_where_there_are_experts(agree, name, value):
    agree(MODEL, {name: value})
    with pytest.raises(ValueError, match=name):
        agree(EXPERTS, {name: value})


def test_yarn_of_a_part_of_a_head_is_refused_of_megatron_which_rotates_whole_heads(agree):
    changes = {"position_embedding_type": "yarn", "rotary_percent": 0.5}
    with pytest.raises(ValueError, match="rotary_percent=0.5 is not supported: Megatron's YaRN"):
        agree(MODEL | changes, changes)


def test_a_newer_name_of_the_epsilon_is_compared(agree):
    with pytest.raises(ValueError, match="norm_epsilon is 0.5 in the checkpoint, 1e-06"):
        agree(MODEL, {"layernorm_epsilon": 0.5})


def test_a_newer_name_of_unit_offset_norms_is_compared(agree):
    agree(MODEL | {"apply_layernorm_1p": True}, {"layernorm_zero_centered_gamma": True})
    with pytest.raises(ValueError, match="apply_layernorm_1p is True in the checkpoint, None in"):
        agree(MODEL, {"layernorm_zero_centered_gamma": True})


GELU = MODEL | {"swiglu": False, "activation": "gelu_tanh"}


def test_activations_without_a_gate_are_compared(agree):
    agree(GELU, {"activation": None})
    agree(GELU | {"activation": "relu2"}, {"squared_relu": True, "activation": None})
    agree(GELU | {"activation": "xielu"}, {})  # as our converter records it
    agree(GELU | {"activation": "relu2"}, {"squared_relu": True})
    with pytest.raises(ValueError, match="activation is 'relu2' in the checkpoint, 'gelu_tanh'"):
        agree(GELU, {"squared_relu": True, "activation": None})
    with pytest.raises(ValueError, match="activation is 'gelu' in the checkpoint, 'relu2'"):
        agree(GELU | {"activation": "relu2"}, {"activation": None})


def test_a_gate_of_quick_gelu_is_compared(agree):
    quick = MODEL | {"swiglu": False, "activation": "quick_gelu", "gated_mlp": True, "glu_linear_offset": 1.0}
    by_flags = {"activation": None, "gated_mlp": None}
    agree(quick, by_flags | {"quick_geglu": True})
    with pytest.raises(ValueError, match="activation is 'gelu' in the checkpoint, 'quick_gelu'"):
        agree(quick, by_flags)
    with pytest.raises(ValueError, match="glu_linear_offset is 0.5 in the checkpoint, 1.0"):
        agree(quick, by_flags | {"quick_geglu": True, "glu_linear_offset": 0.5})


def test_the_scale_that_megatron_takes_by_itself_may_be_written_out(agree):
    agree(MODEL | {"softmax_scale": MODEL["kv_channels"] ** -0.5}, {"softmax_scale": None})
    agree(MODEL, {"softmax_scale": MODEL["kv_channels"] ** -0.5})
    with pytest.raises(ValueError, match="softmax_scale is None"):
        agree(MODEL | {"softmax_scale": 0.3}, {"softmax_scale": None})


WINDOWS = {"window_size": [127, 0], "window_attn_skip_freq": [1, 1, 0]}


def test_windows_agree_where_the_same_layers_have_the_same_one(agree):
    agree(MODEL | WINDOWS, {"window_size": (127, 0), "window_attn_skip_freq": 3})
    agree(MODEL | WINDOWS | {"no_rope_freq": [0, 0, 1]}, WINDOWS | {"no_rope_freq": 3})


@pytest.mark.parametrize(
    "recorded",
    [
        {"window_size": None},
        {"window_size": (126, 0), "window_attn_skip_freq": 3},
        {"window_size": (127, 0), "window_attn_skip_freq": None},
        {"window_size": (127, 0), "window_attn_skip_freq": [1, 0, 1]},
    ],
)
def test_other_windows_than_recorded_are_refused(agree, recorded):
    with pytest.raises(ValueError, match="window_size is"):
        agree(MODEL | WINDOWS, recorded)


@pytest.fixture
def bridge(tmp_path):
    def check(changes: dict, model_args: dict = MODEL) -> None:
        model = {"_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen2ModelProvider", "num_layers": 3}
        (tmp_path / "run_config.yaml").write_text(yaml.safe_dump({"model": model | changes}))
        found = recorded_by_megatron.recorded_arguments(tmp_path)
        recorded_by_megatron.check_agreement(tmp_path, found, model_args)

    return check


@pytest.mark.parametrize(
    "name, value, word",
    [
        *((name, list(value) if isinstance(value, tuple) else value, name) for name, value in SAME_FOR_ALL),
        ("layernorm_zero_centered_gamma", True, "apply_layernorm_1p"),
        ("seq_len_interpolation_factor", 4.0, "rotary_seq_len_interpolation_factor"),
        ("window_size", [128, 0], "window_size"),
        ("rotary_interleaved", True, "rotary_interleaved"),
        ("gated_linear_unit", False, "swiglu"),
        ("rope_scaling", True, "use_rope_scaling"),
        ("low_freq_factor", 1.0, "use_rope_scaling"),
        ("low_freq_factor", 2.0, "low_freq_factor"),
        ("position_embedding_type", "yarn", "position_embedding_type"),
        ("activation_func", {"_target_": "torch.nn.functional.gelu"}, "activation_func"),
        ("_target_", "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider", "_target_"),
        ("_target_", "megatron.bridge.models.mamba.mamba_provider.MambaModelProvider", "_target_"),
    ],
)
def test_what_bridge_recorded_and_we_do_not_compute_is_refused_by_name(bridge, name, value, word):
    with pytest.raises(ValueError, match=word):
        bridge({name: value})


def test_what_bridge_records_of_a_model_that_we_compute_is_accepted(bridge):
    bridge(
        {
            "activation_func": {"_target_": "torch.nn.functional.silu"},
            "gated_linear_unit": True,
            "softmax_type": "vanilla",
            "window_size": None,
            "hf_model_id": "Qwen/Qwen2-7B",
            "generation_config": {"_target_": "x"},
            "attention_dropout": 0.0,
            "bf16": True,
            "moe_router_score_function": "sigmoid",
        }
    )


@pytest.mark.parametrize(
    "text", ["", "model: 3", "model: [", "model: {a: !!python/object:os.system {}}", "[1]"]
)
def test_a_run_config_that_cannot_be_read_is_one_line_with_its_name(tmp_path, text):
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run_config\.yaml: cannot be read"):
        recorded_by_megatron.recorded_arguments(tmp_path)


@pytest.mark.parametrize("name, value", SAME_FOR_ALL)
def test_a_description_that_asks_for_what_we_do_not_compute_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"star_checkpoint.json: {name}="):
        check_arguments(MODEL | {name: value}, "star_checkpoint.json")


def test_descriptions_of_all_families_are_accepted():
    for config in CONFIGS.values():
        check_arguments(model_arguments(json.loads(config.to_json_string())), "star_checkpoint.json")


def test_every_field_of_megatrons_configuration_has_been_looked_at():
    """A field that a new Megatron-Core adds is refused unless it has its default: look whether it need be."""
    must_have_their_default = {
        field.name
        for field in dataclasses.fields(TransformerConfig)
        if field.name not in recorded_arguments.MODELLED | recorded_arguments._ALLOWED.keys()
        and not recorded_arguments._WITHOUT_EFFECT.match(field.name)
    }
    assert len(must_have_their_default) == 18, sorted(must_have_their_default)
