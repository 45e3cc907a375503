"""What Megatron-LM (`args`) or Megatron Bridge (`run_config.yaml`) recorded, in Megatron-LM's names."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.safe_globals import register_safe_globals
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.training.arguments import add_megatron_arguments

from checkpoints_tools import latent_in_megatron
from checkpoints_tools.families import FAMILIES
from megatron_star.checked_input import shown
from megatron_star.model.optional_arguments import LATENT_SIZES, OPTIONAL
from megatron_star.model.recorded_arguments import is_every_layer, not_understood
from megatron_star.model.stored_weights import without_torch_warnings
from megatron_star.model.transformer_config import OWN_FIELDS, StarTransformerConfig

_BRIDGE_FILE = "run_config.yaml"
# Names of TransformerConfig and GPTModel, which Megatron Bridge has and newer versions of Megatron-LM.
_RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "scale_factor": "rope_scaling_factor",  # of Bridge's Llama 3.1
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
_ROPE_SCALING, _EXPERTS, _YARN = "use_rope_scaling", "num_experts", "yarn"
_LATENT = "multi_latent_attention"
# What decides the result and may differ between models whose tensors have the same shapes; and with what.
_COMPARED = {
    "num_layers": None,
    "hidden_size": None,
    "ffn_hidden_size": None,
    "num_attention_heads": None,
    "num_query_groups": None,
    "kv_channels": None,
    "normalization": None,
    "norm_epsilon": None,
    "add_bias_linear": None,
    "add_qkv_bias": None,
    "qk_layernorm": None,
    "swiglu": None,
    "untie_embeddings_and_output_weights": None,
    "position_embedding_type": None,
    "rotary_base": None,
    "rotary_percent": None,
    "rotary_interleaved": None,
    "use_rope_scaling": None,
    "rope_scaling_factor": _ROPE_SCALING,
    "rotary_scaling_factor": _YARN,
    "yarn_original_max_position_embeddings": _YARN,
    "yarn_beta_fast": _YARN,
    "yarn_beta_slow": _YARN,
    "yarn_correction_range_round_to_int": _YARN,
    "mscale": _YARN,
    "mscale_all_dim": _YARN,
    "num_experts": None,
    "moe_ffn_hidden_size": _EXPERTS,
    "moe_router_topk": _EXPERTS,
    "moe_router_pre_softmax": _EXPERTS,
    "moe_layer_freq": _EXPERTS,
}
_YARN_SCALES = {"mscale": 1.0, "mscale_all_dim": 0.0}  # which Megatron takes where we say nothing
_MEANT_BY_NONE = {
    **{field.name: field.default for field in fields(StarTransformerConfig)},
    "apply_layernorm_1p": False,
    "rotary_seq_len_interpolation_factor": 1.0,
    "moe_router_topk_scaling_factor": 1.0,
}
# What programs put among the arguments that no parser declares, or that earlier versions declared.
_DERIVED = frozenset(
    (
        *("rank", "world_size", "local_rank", "data_parallel_size", "iteration", "params_dtype"),
        *("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples", "curr_iteration"),
        *("padded_vocab_size", "vocab_size", "transformer_pipeline_model_parallel_size", "use_dist_ckpt"),
        *(
            "dist_ckpt_format",
            "use_mcore_models",
            "norm_epsilon",
            "max_position_embeddings",
            "variable_seq_lengths",
        ),
        *("virtual_pipeline_model_parallel_size", "do_train", "do_valid", "do_test", "start_weight_decay"),
        *("encoder_tensor_model_parallel_size", "encoder_pipeline_model_parallel_size", "eod_mask_loss"),
        *("async_tensor_model_parallel_allreduce", "apply_rope_fusion", "fp8_interval", "ckpt_step"),
    )
)
# Of Bridge's providers beyond TransformerConfig.
_OF_BRIDGE = frozenset(
    (
        *("_target_", "fp16_lm_cross_entropy", "parallel_output", "seq_length", "hf_model_id", "vocab_size"),
        *("share_embeddings_and_output_weights", "scatter_embedding_sequence_parallel", "should_pad_vocab"),
        *("tp_comm_overlap_cfg", "use_transformer_engine_full_layer_spec", "transformer_layer_spec"),
        *("generation_config", "make_vocab_size_divisible_by", "bias_dropout_add_fusion", "activation_func"),
        *("gated_linear_unit", "use_arbitrary_attention_mask", "low_freq_factor", "high_freq_factor"),
        *("old_context_len", "params_dtype", "autocast_dtype", "pipeline_dtype"),
    )
)
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
_BRIDGE_NAMES = "|".join(filter(None, ["GPT", *(family.bridge_provider for family in FAMILIES.values())]))
_PROVIDERS = re.compile(rf"({_BRIDGE_NAMES})(Model)?Provider\w*$")


def recorded_arguments(weights: Path) -> dict[str, Any]:
    """What was recorded beside the weights, in Megatron-LM's names; empty if nothing was.

    Raises:
        ValueError: it cannot be read, or changes results in a way that we do not model.
    """
    for path in (weights / _BRIDGE_FILE, weights.parent / _BRIDGE_FILE):
        if path.is_file():
            return _bridge_arguments(path)
    register_safe_globals()
    try:
        with without_torch_warnings():
            args = load_common_state_dict(str(weights)).get("args", argparse.Namespace())
        recorded = _renamed(vars(args))
    except Exception as error:  # of torch's unpickler and of Megatron, about these bytes
        raise ValueError(
            f"{weights}: its common state cannot be read ({type(error).__name__}: {error})"
        ) from error
    if recorded.get("swiglu") is False:
        flags = recorded.pop("squared_relu", False), recorded.pop("quick_geglu", False)
        if not recorded.get("activation"):  # which our own converter records
            recorded |= _activation(*flags)
    _refuse(recorded, weights, _parsed_names() | _DERIVED)
    return recorded


def _activation(squared_relu: bool, quick_geglu: bool) -> dict[str, Any]:
    """Of an MLP without SwiGLU, which Megatron-LM gates only with quick GELU."""
    if quick_geglu:
        return {"activation": "quick_gelu", "gated_mlp": True}
    return {"activation": "relu2" if squared_relu else "gelu"}


def _parsed_names() -> frozenset[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add_megatron_arguments(parser)
    return frozenset(action.dest for action in parser._actions)


def _refuse(recorded: Mapping[str, Any], source: Path, known: frozenset[str]) -> None:
    percent = recorded.get("rotary_percent")
    if recorded.get("position_embedding_type") == _YARN and percent not in (None, 1.0):
        raise ValueError(
            f"{source}: rotary_percent={shown(percent)} is not supported: Megatron's YaRN rotates whole heads"
        )
    if problem := not_understood(recorded, known):
        raise ValueError(f"{source}: {problem}: it may change what the model computes")


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in values.items() if name not in _RENAMED} | {
        new: values[old] for old, new in _RENAMED.items() if values.get(old) is not None
    }
    if found.get("moe_router_group_topk") == found.get("moe_router_num_groups"):  # of all groups, or none are
        found |= dict.fromkeys(found.keys() & {"moe_router_group_topk", "moe_router_num_groups"})
    elif found.get("moe_router_group_topk"):
        found.setdefault("moe_router_group_score", "top_sum")
    return latent_in_megatron.of_megatron(found)


def _bridge_arguments(path: Path) -> dict[str, Any]:
    try:
        model = dict(yaml.safe_load(path.read_text("utf-8"))["model"])
    except Exception as error:  # of yaml, or because it is no mapping, about this text
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    recorded = _renamed(model)
    target = str(model.get("_target_") or "GPTModelProvider")
    if not _PROVIDERS.match(target.rpartition(".")[2]):
        raise ValueError(f"{path}: _target_={shown(target)} is not supported")
    activation = model.get("activation_func")
    if activation is not None and not re.search(r"\bsilu\b", str(activation)):
        raise ValueError(f"{path}: activation_func={shown(activation)} is not supported; silu is")
    for name, constant in _LLAMA3_CONSTANTS.items():
        if model.get(name, constant) != constant:
            raise ValueError(
                f"{path}: {name}={shown(model[name])}; Megatron's scaling has {constant} built in"
            )
    if "low_freq_factor" in model:
        recorded[_ROPE_SCALING] = True
    if "share_embeddings_and_output_weights" in model:
        recorded["untie_embeddings_and_output_weights"] = not model["share_embeddings_and_output_weights"]
    if model.get("gated_linear_unit") is not None:
        recorded["swiglu"] = model["gated_linear_unit"]
    _refuse({name: value for name, value in recorded.items() if name not in _OF_BRIDGE}, path, _OF_BRIDGE)
    return recorded


def what_is_missing(recorded: Mapping[str, Any]) -> str:
    """What a description needs and was not recorded."""
    missing = [name for name in _COMPARED if name not in recorded and _has_effect(name, recorded)]
    return ", ".join(["the family", "the tokenizer", *missing])


def _has_effect(name: str, args: Mapping[str, Any]) -> bool:
    condition = _COMPARED[name]
    if condition == _YARN:
        return args.get("position_embedding_type") == _YARN
    return condition is None or bool(args.get(condition))


def check_agreement(directory: Path, recorded: Mapping[str, Any], model_args: Mapping[str, Any]) -> None:
    """Raises ValueError, naming it, if something was recorded that is not what `model_args` say."""
    if recorded.get(_LATENT) and not model_args.get(_LATENT):  # of which other names have another meaning
        raise _disagreement(directory, _LATENT, recorded, False)
    for name in _COMPARED:
        if recorded.get(name) is None or not _has_effect(name, model_args):
            continue
        found, expected = recorded[name], model_args.get(name)
        if name == "num_query_groups" and not recorded.get("group_query_attention", True):
            found = recorded.get("num_attention_heads")
        if expected is None and name in _YARN_SCALES:
            expected = _YARN_SCALES[name]
        if name == "moe_router_pre_softmax" and model_args.get("moe_router_score_function") == "sigmoid":
            continue
        if name == "moe_layer_freq" and _are_in_every_layer(found, expected, model_args["num_layers"]):
            continue
        if found != expected and not (name == "num_experts" and not found and not expected):
            raise _disagreement(directory, name, {name: found}, expected)
    for name in _optional_names(recorded, model_args):
        if not _means_the_same(name, recorded, model_args):
            raise _disagreement(directory, name, recorded, model_args.get(name))


def _are_in_every_layer(found: Any, expected: Any, num_layers: int) -> bool:
    return is_every_layer(found, num_layers) and is_every_layer(expected, num_layers)


def _optional_names(recorded: Mapping[str, Any], model_args: Mapping[str, Any]) -> list[str]:
    """Of arguments that a description may lack, those that were recorded and have an effect by themselves."""
    names = [name for name in (*OPTIONAL, *OWN_FIELDS) if name in recorded]
    without_effect = {"window_attn_skip_freq"}
    if not model_args.get("multi_latent_attention"):
        without_effect |= {"q_lora_rank", *LATENT_SIZES}
    if not model_args.get("num_experts"):
        without_effect |= {name for name in names if name.startswith("moe_")}
    return [name for name in names if name not in without_effect]


def _disagreement(directory: Path, name: str, recorded: Mapping[str, Any], expected: Any) -> ValueError:
    found = shown(recorded[name])
    return ValueError(f"{directory}: {name} is {found} in the checkpoint, {shown(expected)} in --hf-config")


def _means_the_same(name: str, recorded: Mapping[str, Any], model_args: Mapping[str, Any]) -> bool:
    try:
        found = _meaning(name, recorded, model_args)
    except (TypeError, ValueError, ArithmeticError):  # of a value that no such argument has
        return False
    return found == _meaning(name, model_args, model_args)


def _meaning(name: str, args: Mapping[str, Any], model_args: Mapping[str, Any]) -> Any:
    """The value of an argument that may be missing, however it is written."""
    value, layers = args.get(name), range(1, model_args["num_layers"] + 1)
    if name == "window_size":
        window, pattern = tuple(args.get("window_size") or (-1, -1)), args.get("window_attn_skip_freq")
        has_window = [is_layer_window_attention(window, pattern, layer) for layer in layers]
        return window != (-1, -1) and any(has_window) and (window, has_window)
    if name == "no_rope_freq" and not isinstance(value, list):
        return [int(bool(value) and layer % value == 0) for layer in layers]
    if name == "latent_norm_epsilon":
        return value or args.get("norm_epsilon")
    if name == "softmax_scale":
        return value or model_args["kv_channels"] ** -0.5
    if name == "activation" and value == "gelu_tanh":
        return "gelu"  # which of the two Megatron computes depends on a fusion
    return _MEANT_BY_NONE.get(name) if value is None else value
