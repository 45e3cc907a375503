"""What a model family is: its weights, its arguments, and what of its config.json is refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.weight import Weight
from checkpoints_tools.families.weights import (
    ATTENTION,
    DENSE_MLP,
    EMBEDDING,
    FINAL_NORM,
    FINAL_NORM_BIAS,
    OUTPUT_LAYER,
)
from megatron_star.model.checked_values import CheckedValues

IN_ALL_LAYERS, IN_SOME_LAYERS = "sliding_window", "layer_types"

# Keys of config.json that change results, and the values with which Megatron computes the same.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "is_causal": (True,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
}


def neutral_but(*keys: str) -> dict[str, tuple[Any, ...]]:
    """NEUTRAL without these keys, which a family reads, or its models do not."""
    return {key: values for key, values in NEUTRAL.items() if key not in keys}


@dataclass(frozen=True)
class Family:
    """A model family. The values that its functions see are those of transformers' configuration object.

    Attributes:
        model_type: of config.json. transformers' configuration class of this name reads the JSON.
        config_of: the `model_type` whose class of transformers reads the JSON, if there is none of this name.
        bridge_provider: a pattern of what Megatron Bridge calls it, before `ModelProvider`; None: nothing
            that we know.
        arguments: the model in Megatron's argument names. Raises ValueError for what has none.
        neutral: keys that are not read but change results, and the only values that they may have.
        windows: which layers may have a sliding window, or chunks: IN_ALL_LAYERS, all where `sliding_window`
            is set; IN_SOME_LAYERS, those of which `layer_types` says so; None, the model has no such layers.
        has_prediction_layers: checkpoints may have layers after the last one, which predict several tokens:
            `num_nextn_predict_layers` of them. They are left out.
        layer: the weights of a layer; those that a model has whose arguments ask for them.
        end: the weights between the layers and the output layer.
    """

    model_type: str
    bridge_provider: str | None = None
    arguments: Callable[[CheckedValues], dict[str, Any]] = decoder_arguments
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: NEUTRAL)
    windows: str | None = None
    config_of: str | None = None
    has_prediction_layers: bool = False
    embedding: Weight = EMBEDDING
    layer: tuple[Weight, ...] = (*ATTENTION, *DENSE_MLP)
    end: tuple[Weight, ...] = (FINAL_NORM, FINAL_NORM_BIAS)
    output_layer: Weight = OUTPUT_LAYER

    @property
    def config_type(self) -> str:
        """The `model_type` of transformers' configuration class."""
        return self.config_of or self.model_type
