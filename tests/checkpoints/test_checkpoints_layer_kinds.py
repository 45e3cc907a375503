"""Which layers see a window or a chunk, and which are rotated, is what transformers makes of config.json."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from checkpoints_tools.families.family import IN_ALL_LAYERS, IN_SOME_LAYERS, Family
from checkpoints_tools.families.layer_kinds import (
    layer_kind_arguments,
    unrotated_full_layers,
    unrotated_layers,
)
from megatron_star.model.checked_values import CheckedValues
from megatron_star.planning.layer_mask import layer_masks

_LAYERS, _TOKENS = 6, 20
_ALL, _SOME = (Family("x", windows=windows) for windows in (IN_ALL_LAYERS, IN_SOME_LAYERS))


def resolved(model_type: str, **keys: Any) -> Any:
    """transformers' configuration object, of six layers."""
    return CONFIG_MAPPING[model_type](num_hidden_layers=_LAYERS, **keys)


def kinds_of(family: Family, config: Any, **args: Any) -> dict[str, Any]:
    sizes = {"num_layers": _LAYERS, "max_position_embeddings": 64}
    return layer_kind_arguments(family, CheckedValues(vars(config), "config.json"), sizes | args)


def masks_of_transformers(config: Any) -> list[torch.Tensor]:
    """[tokens, tokens] for each layer: who sees whom."""
    functions = {
        "full_attention": causal_mask_function,
        "sliding_attention": sliding_window_causal_mask_function(config.sliding_window)
        if getattr(config, "sliding_window", None)
        else None,
        "chunked_attention": chunked_causal_mask_function(config.attention_chunk_size, torch.zeros(1).long())
        if getattr(config, "attention_chunk_size", None)
        else None,
    }
    of_all = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [of_all] * _LAYERS
    rows, columns = torch.arange(_TOKENS)[:, None], torch.arange(_TOKENS)[None]
    return [functions[kind](0, 0, rows, columns) & (columns <= rows) for kind in kinds]


def our_masks(args: dict[str, Any]) -> list[torch.Tensor]:
    masks = layer_masks(SimpleNamespace(num_layers=_LAYERS, **args))
    first = [[mask.first_seen(p) if mask else 0 for p in range(_TOKENS)] for mask in masks]
    rows, columns = torch.arange(_TOKENS)[:, None], torch.arange(_TOKENS)[None]
    return [(torch.tensor(of_layer)[:, None] <= columns) & (columns <= rows) for of_layer in first]


CONFIGS = {
    "a window in all layers": (_ALL, resolved("mistral", sliding_window=5)),
    "no window": (_ALL, resolved("mistral", sliding_window=None)),
    "every second layer": (_SOME, resolved("gemma2", sliding_window=5)),
    "all but every sixth layer": (_SOME, resolved("gemma3_text", sliding_window=5)),
    "a pattern": (_SOME, resolved("gemma3_text", sliding_window=5, sliding_window_pattern=3)),
    "a list": (
        _SOME,
        resolved(
            "olmo3",
            sliding_window=1,
            layer_types=["full_attention", *["sliding_attention"] * 4, "full_attention"],
        ),
    ),
    "from a layer on": (
        _SOME,
        resolved("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2),
    ),
    "a pattern in letters": (_SOME, resolved("exaone4", sliding_window=7, sliding_window_pattern=2)),
    "chunks": (_SOME, resolved("llama4_text", attention_chunk_size=6)),
    "chunks in all layers but one": (
        _SOME,
        resolved("llama4_text", attention_chunk_size=7, no_rope_layers=[1, 1, 0, 1, 1, 1]),
    ),
}


@pytest.mark.parametrize("family, config", CONFIGS.values(), ids=CONFIGS)
def test_every_layer_sees_what_it_sees_in_transformers(family, config):
    args = kinds_of(family, config)
    for found, expected in zip(our_masks(args), masks_of_transformers(config), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name, size", [("gemma2", "sliding_window"), ("llama4_text", "attention_chunk_size")]
)
def test_a_window_or_a_chunk_as_long_as_the_longest_context_is_none(name, size):
    assert kinds_of(_SOME, resolved(name, **{size: 64})) == {}
    assert kinds_of(_SOME, resolved(name, **{size: 63})) != {}
    masked = CONFIG_MAPPING[name](num_hidden_layers=_LAYERS, **{size: _TOKENS})
    for mask in masks_of_transformers(masked):  # which shows it, for contexts of that many tokens
        assert torch.equal(mask, torch.ones(_TOKENS, _TOKENS).bool().tril())


def test_a_window_whose_layers_are_rotated_otherwise_stays_however_long():
    found = kinds_of(_SOME, resolved("gemma2", sliding_window=64), window_rotary_base=1e4)
    assert found["window_size"] == [63, 0] and found["window_attn_skip_freq"] == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["smollm3", "llama4_text"])
def test_no_rope_layers_says_the_opposite_of_its_name(name):
    config = resolved(name, no_rope_layers=[1, 0, 1, 1, 0, 1])
    args = unrotated_layers(CheckedValues(vars(config), "config.json"))
    assert args == {"no_rope_freq": [0, 1, 0, 0, 1, 0]}
    every = resolved(name, no_rope_layers=[1] * _LAYERS)
    assert unrotated_layers(CheckedValues(vars(every), "config.json")) == {}


def test_layers_without_a_window_are_not_rotated_where_a_family_says_so():
    config = resolved("cohere2", sliding_window=5)
    args = unrotated_full_layers(CheckedValues(vars(config), "config.json"))
    assert args == {"no_rope_freq": [0, 0, 0, 1, 0, 0]}


def test_what_does_not_say_the_kinds_of_all_layers_is_refused():
    values = vars(resolved("olmo3", sliding_window=5))
    refused = {
        "layer_types has 'linear_attention'": {"layer_types": ["linear_attention"] * _LAYERS},
        "a list of 6": {"layer_types": ["full_attention"]},
        "layer_types=None": {"layer_types": None},
        "sliding_window=None": {"sliding_window": None},
        "sliding_window=0": {"sliding_window": 0},
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message):
            kinds_of(_SOME, SimpleNamespace(**values | changes))
    chunked = vars(resolved("llama4_text")) | {"attention_chunk_size": None}
    with pytest.raises(ValueError, match="attention_chunk_size=None"):
        kinds_of(_SOME, SimpleNamespace(**chunked))
    with pytest.raises(ValueError, match="sliding_window=5 is not supported for y"):
        kinds_of(Family("y"), SimpleNamespace(**values))
    with pytest.raises(ValueError, match="no_rope_layers=.*a list of 6 zeros and ones"):
        unrotated_layers(CheckedValues({"no_rope_layers": [1, 2], "num_hidden_layers": 6}, "config.json"))
