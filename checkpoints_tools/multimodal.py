"""Language models inside multimodal checkpoints: their configuration, and their tensors' names.

Only the language model is converted, under the names that it has alone. The table has models in which it
computes the same from text, whatever surrounds it: those with another mask or other positions are not in it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig

from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues

Config = dict[str, Any]

PREDICTION_LAYERS = "num_nextn_predict_layers"
_MOST_PREDICTION_LAYERS = 100

# What may stand in config.json outside of the language model's own part, and is of the whole.
_OF_THE_WHOLE = (
    "dtype",
    "torch_dtype",
    "quantization_config",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_DECIDED_BY_THE_WHOLE = ("model_type", "tie_word_embeddings")
# What a language model does to its logits alone, and not inside of a multimodal model; else nothing.
_OF_LOGITS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


class Surroundings(NamedTuple):
    """How the tensors of a multimodal checkpoint are named.

    Attributes:
        text: how names of the language model begin, and how they begin where it is alone.
        others: how names of all else begin.
    """

    text: tuple[tuple[str, str], ...]
    others: tuple[str, ...]

    def name_alone(self, name: str) -> str | None:
        """The tensor's name in the language model alone; None: it is no part of it.

        What is neither keeps its name, by which it is refused.
        """
        if name.startswith(self.others):
            return None
        for begin, alone in self.text:
            if name.startswith(begin):
                return alone + name.removeprefix(begin)
        return name


_LLAVA = Surroundings(
    text=(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
    others=tuple(
        prefix + part
        for prefix in ("", "model.")
        for part in ("vision_tower.", "vision_model.", "multi_modal_projector.", "image_newline")
    ),
)
_IDEFICS = Surroundings(
    text=(("model.text_model.", "model."),), others=("model.vision_model.", "model.connector.")
)
SURROUNDINGS: Mapping[str, Surroundings] = {
    "gemma3": _LLAVA,
    "idefics3": _IDEFICS,
    "internvl": _LLAVA,
    "llama4": _LLAVA,
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "mistral3": _LLAVA,
    "smolvlm": _IDEFICS,
}


def prediction_layers(config: Mapping[str, Any]) -> Surroundings:
    """Around a language model alone: the layers after its last one, which predict several tokens at once.

    Raises:
        ValueError: config.json does not say how many there are of either.
    """
    values = CheckedValues(config, "config.json")
    first = values.integer("num_hidden_layers")
    count = values.integer(PREDICTION_LAYERS, least=0, most=_MOST_PREDICTION_LAYERS, default=1)
    return Surroundings((), ("model.mtp_", *(f"model.layers.{first + i}." for i in range(count))))


def surroundings_of(config: Mapping[str, Any]) -> Surroundings | None:
    """Of a checkpoint with this config.json; None: it is of a language model alone."""
    model_type = config.get("model_type")
    return SURROUNDINGS.get(model_type) if isinstance(model_type, str) else None


def text_config(config: Config) -> Config:
    """The configuration of the language model alone, as a config.json of its own.

    Raises:
        ValueError: transformers does not accept the configuration of the whole.
    """
    if surroundings_of(config) is None:
        return config
    of_text = config.get("text_config")
    if not isinstance(of_text, dict):
        raise ValueError(f"config.json: text_config={shown(of_text)}: it must describe the language model")
    decisive = {"text_config": _only(of_text, _DECIDED_BY_THE_WHOLE), **_only(config, _DECIDED_BY_THE_WHOLE)}
    try:
        resolved = CONFIG_MAPPING[config["model_type"]].from_dict(decisive)
    except Exception as error:  # whatever transformers' code raises on this JSON is about this JSON
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"config.json: transformers does not accept it: {said}") from error
    _refuse_changed_logits(config["model_type"], resolved.text_config, of_text)
    return {
        **_only(config, _OF_THE_WHOLE),
        **of_text,
        "model_type": resolved.text_config.model_type,
        "tie_word_embeddings": bool(resolved.tie_word_embeddings),
    }


def _refuse_changed_logits(model_type: str, resolved: PreTrainedConfig, of_text: Config) -> None:
    """Alone, and inside of the whole, the language model would have other logits."""
    for key, neutral in _OF_LOGITS.items():
        value = of_text.get(key, getattr(resolved, key, neutral))
        if value != neutral:
            raise ValueError(
                f"config.json: text_config: {key}={shown(value)} is not supported in {model_type}"
            )


def _only(config: Config, keys: tuple[str, ...]) -> Config:
    return {key: config[key] for key in keys if key in config}
