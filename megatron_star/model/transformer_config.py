"""What we add to Megatron's configuration of a model: one table of fields, which is a dataclass.

A new field is one line here: its default, which means what plain Megatron computes, and what a checkpoint may
say. `architecture.py` passes it on, `recorded_arguments.py` checks it. Modules read fields with `own_field`,
since a model that somebody else built has Megatron's own configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_star.model.checked_values import CheckedValues

Check = Callable[[CheckedValues, str], object]
"""Looks at the value of a name; raises ValueError."""


def _squared_relu(values: Tensor) -> Tensor:
    """Megatron's is compiled by itself, so that a layer that calls it cannot be."""
    return F.relu(values).square()


def _learned(_: Tensor) -> Tensor:
    raise AssertionError("this activation has weights: it is a module of the layer specification")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": _squared_relu,
    "quick_gelu": quick_gelu,
    "xielu": _learned,
}


def one_per_layer(values: CheckedValues, name: str) -> list[int]:
    """A list of zeros and ones, one for each layer."""
    return values.flags(name, values.integer("num_layers"))


def _one_of(*allowed: Any) -> Check:
    return partial(CheckedValues.one_of, allowed=allowed)


def _own(default: Any, check: Check, needs: str | None = None) -> Any:
    """A field; `needs` names another argument, without which a value other than the default says nothing."""
    return field(default=default, metadata={"check": check, "needs": needs})


@dataclass
class StarTransformerConfig(TransformerConfig):
    """Megatron's configuration with the fields that we compute beyond it.

    Attributes:
        attention_chunk_size: of the layers of `chunked_layers`, whose tokens see their own chunk only.
        chunked_layers: 1 for each such layer, else 0.
        attention_softcap: attention scores become softcap * tanh(score / softcap).
        logits_softcap: the same of logits.
        window_rotary_base: window layers rotate with a plain embedding of this base.
        norm_placement: norms before attention and MLP, after them on their outputs, or both.
        norm_bias: whether a LayerNorm has a bias.
        parallel_mlp: attention and MLP both read the output of the layer's one norm.
        qk_layernorm_span: queries and keys are normalised by head, or over all heads together.
        qk_norm_of_rotated_only: layers of `no_rope_freq` do not normalise queries and keys.
        qk_layernorm_after_rotation: and not before it.
        add_proj_bias, add_mlp_bias: biases of attention's output, and of the MLP, where not all have one.
        activation: of the MLP, by name; None leaves `activation_func` and `gated_linear_unit` as they are.
        gated_mlp: activation(gate) * up; only together with `activation`.
        embedding_multiplier, logits_multiplier: through Megatron's MuP, nothing else of which is used.
        round_embedding_multiplier: to the dtype of the weights first, as Gemma's models do.
        residual_multiplier: of what attention and MLP add to the residual stream.
        rope_low_freq_factor, rope_high_freq_factor, rope_original_max_position_embeddings: of Llama-3
            scaling; Megatron has 1, 4 and 8192 built in.
        longrope_short_factors, longrope_long_factors: see `longrope.py`; what divides each frequency.
        longrope_attention_factor: of cosines and sines, as YaRN's concentration factor.
        query_scale_beta, query_scale_floor, query_scale_offset: see `query_scale.py`.
        query_scale_layers: 1 for each layer that scales its queries, else 0; None for all.
        moe_router_group_score: of a group of experts: the sum of its best moe_router_topk //
            moe_router_group_topk scores (arXiv 2412.19437), or its best one (arXiv 2405.04434).
        latent_norm_epsilon: of the norms of latents; None for that of all norms.
        moe_router_normalised: whether the weights of the chosen experts are divided by their sum; None for
            what Megatron does with the score function.
    """

    attention_chunk_size: int | None = _own(None, CheckedValues.integer, "chunked_layers")
    chunked_layers: list[int] | None = _own(None, one_per_layer, "attention_chunk_size")
    attention_softcap: float | None = _own(None, CheckedValues.number)
    logits_softcap: float | None = _own(None, CheckedValues.number)
    window_rotary_base: float | None = _own(None, CheckedValues.number, "window_size")
    norm_placement: str = _own("before", _one_of("before", "after", "both"))
    norm_bias: bool = _own(True, CheckedValues.boolean)
    parallel_mlp: bool = _own(False, CheckedValues.boolean)
    qk_layernorm_span: str = _own("head", _one_of("head", "all_heads"), "qk_layernorm")
    qk_norm_of_rotated_only: bool = _own(False, CheckedValues.boolean, "no_rope_freq")
    qk_layernorm_after_rotation: bool = _own(False, CheckedValues.boolean, "qk_layernorm")
    add_proj_bias: bool = _own(False, CheckedValues.boolean)
    add_mlp_bias: bool = _own(False, CheckedValues.boolean)
    activation: str | None = _own(None, _one_of(*ACTIVATIONS))
    gated_mlp: bool = _own(False, CheckedValues.boolean, "activation")
    embedding_multiplier: float = _own(1.0, CheckedValues.number)
    round_embedding_multiplier: bool = _own(False, CheckedValues.boolean, "embedding_multiplier")
    residual_multiplier: float = _own(1.0, CheckedValues.number)
    rope_low_freq_factor: float = _own(1.0, CheckedValues.number, "use_rope_scaling")
    rope_high_freq_factor: float = _own(4.0, CheckedValues.number, "use_rope_scaling")
    rope_original_max_position_embeddings: int = _own(8192, CheckedValues.integer, "use_rope_scaling")
    longrope_short_factors: list[float] | None = _own(None, CheckedValues.numbers)
    longrope_long_factors: list[float] | None = _own(None, CheckedValues.numbers, "longrope_short_factors")
    longrope_original_max_position_embeddings: int | None = _own(
        None, CheckedValues.integer, "longrope_short_factors"
    )
    longrope_attention_factor: float = _own(1.0, CheckedValues.number, "longrope_short_factors")
    query_scale_beta: float | None = _own(None, CheckedValues.number, "query_scale_floor")
    query_scale_floor: int | None = _own(None, CheckedValues.integer, "query_scale_beta")
    query_scale_offset: int = _own(0, _one_of(0, 1), "query_scale_beta")
    query_scale_layers: list[int] | None = _own(None, one_per_layer, "query_scale_beta")
    logits_multiplier: float = _own(1.0, CheckedValues.number)
    moe_router_group_score: str = _own("top_sum", _one_of("top_sum", "max"), "moe_router_group_topk")
    latent_norm_epsilon: float | None = _own(None, CheckedValues.number, "multi_latent_attention")
    moe_router_normalised: bool | None = _own(None, CheckedValues.boolean, "num_experts")

    def __post_init__(self) -> None:
        """What Megatron has fields for is written into them."""
        if self.activation is not None:
            self.activation_func = ACTIVATIONS[self.activation]
            self.gated_linear_unit = self.gated_mlp
        if self.embedding_multiplier != 1.0 or self.logits_multiplier != 1.0:
            self.use_mup = True
            self.mup_attn_scale_power = 0.5  # 1 / sqrt(head size), as without MuP
            self.mup_embedding_mult = self._embedding_multiplier()
            self.mup_output_mult = self.logits_multiplier
        # Megatron's router has a bias of the choice with sigmoids only; ours, see `router.py`.
        has_bias = self.moe_router_enable_expert_bias
        self.moe_router_enable_expert_bias = has_bias and self.moe_router_score_function != "softmax"
        super().__post_init__()
        self.moe_router_enable_expert_bias = has_bias

    def _embedding_multiplier(self) -> float:
        if not self.round_embedding_multiplier:
            return self.embedding_multiplier
        return torch.tensor(self.embedding_multiplier, dtype=self.params_dtype).item()


@dataclass
class StarMLATransformerConfig(StarTransformerConfig, MLATransformerConfig):
    """The same of a model with multi-head latent attention (arXiv 2405.04434)."""

    multi_latent_attention: bool = True  # again: the first base has the default of plain attention

    def __post_init__(self) -> None:
        """`rotary_interleaved` counts: Megatron, which refuses it here, always rotates neighboring values."""
        interleaved, self.rotary_interleaved = self.rotary_interleaved, False
        super().__post_init__()
        self.rotary_interleaved = interleaved


OWN_FIELDS = {f.name: f for f in fields(StarTransformerConfig) if "check" in f.metadata}
"""By name; a checkpoint's description has the same names."""


def own_field(config: TransformerConfig, name: str) -> Any:
    """A field of the table; of a configuration of plain Megatron, its default."""
    return getattr(config, name, OWN_FIELDS[name].default)


def check_own_arguments(values: CheckedValues, args: Mapping[str, Any]) -> None:
    """Of a description's arguments, those of the table; None says nothing.

    Raises:
        ValueError: a value is not allowed, or says nothing without another argument.
    """
    for name, own in OWN_FIELDS.items():
        if args.get(name) is None:
            continue
        own.metadata["check"](values, name)
        needs = own.metadata["needs"]
        if needs and args[name] != own.default and not args.get(needs):
            raise values.wrong(name, f"absent without {needs}")
