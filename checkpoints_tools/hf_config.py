"""From a Hugging Face config.json to Megatron's argument names, refusing by name what would not be the same.

What a key means, which of two spellings counts and what an absent key stands for differs between families
and is transformers' to say: its configuration class of the family reads the JSON, and its values are used.
"""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from checkpoints_tools.families import family_named
from checkpoints_tools.families.family import Family
from checkpoints_tools.families.layer_kinds import layer_kind_arguments
from checkpoints_tools.multimodal import text_config
from checkpoints_tools.quantisation import quantisation_of
from megatron_star.checked_input import read_json_object, shown
from megatron_star.model.checked_values import CheckedValues

Config = dict[str, Any]

_SOURCE = "config.json"
_LONGEST_ERROR = 300  # characters of what transformers says
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
# What no family may have; an empty one says nothing.
_NEVER = ("per_layer_config", "transformers_weights")


def read_hf_config(directory: Path) -> Config:
    """config.json of a Hugging Face directory; of a multimodal model the part that is of its language model.

    Raises:
        FileNotFoundError, ValueError: it is missing or cannot be read.
    """
    return text_config(read_whole_config(directory))


def read_whole_config(directory: Path) -> Config:
    """config.json of a Hugging Face directory, as it is.

    Raises:
        FileNotFoundError, ValueError: it is missing or not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is {directory} a Hugging Face checkpoint?")
    return read_json_object(path)


def model_arguments(config: Config) -> Config:
    """The model in Megatron's argument names.

    Raises:
        ValueError: the configuration uses something that the Megatron model would not compute the same way.
    """
    family = family_named(config.get("model_type"))
    quantisation_of(config)
    values = _resolved(family, config)
    _refuse_what_differs(family, values)
    args = family.arguments(values)
    return args | layer_kind_arguments(family, values, args)


def _resolved(family: Family, config: Config) -> CheckedValues:
    """The attributes of transformers' own configuration object, made of this JSON."""
    raw = CheckedValues(config, _SOURCE)
    for key in _SIZES:
        if key in raw:
            if config[key] is None:
                raise ValueError(f"{_SOURCE}: {key} is missing")
            raw.integer(key)  # transformers divides by some of them before it has looked at them
    try:
        copied = json.loads(json.dumps(config), object_hook=_special_float)
        resolved = CONFIG_MAPPING[family.config_type].from_dict(copied)
        resolved.standardize_rope_params()  # again, as its models do, which then see all top-level keys
    except Exception as error:  # whatever transformers' code raises on this JSON is about this JSON
        said = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_ERROR]
        raise ValueError(f"{_SOURCE}: transformers does not accept it: {said}") from error
    return CheckedValues(vars(resolved), _SOURCE)


def _special_float(value: Config) -> Any:
    """transformers writes a number that JSON has not as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _refuse_what_differs(family: Family, values: CheckedValues) -> None:
    for key, neutral in family.neutral.items():
        if key in values and not any(values.any(key) == value for value in neutral):
            raise _not_supported(family, values, key)
    for key in _NEVER:
        if values.any(key, None):
            raise _not_supported(family, values, key)


def _not_supported(family: Family, values: CheckedValues, key: str) -> ValueError:
    return ValueError(f"{_SOURCE}: {key}={shown(values.any(key))} is not supported for {family.model_type}")
