"""What attention and MLP give to the residual stream: after a norm, scaled, or side by side.

Shapes: sq tokens, b = 1, h hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_star.model.norms import norm
from megatron_star.model.transformer_config import own_field

OutputWithBias = tuple[Tensor, Tensor | None]


class ResidualSum(torch.nn.Module):
    """In place of Megatron's `get_bias_dropout_add`: residual + multiplier * norm(output + bias).

    For inference only: there is no dropout.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.multiplier = own_field(config, "residual_multiplier")
        self.norm = None
        if own_field(config, "norm_placement") != "before":
            self.norm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[OutputWithBias, Tensor, float], Tensor]:
        """The sum, as Megatron asks for it."""
        assert not training
        return self.sum

    def sum(self, output_with_bias: OutputWithBias, residual: Tensor, dropout: float) -> Tensor:
        """[sq, b, h] thrice; the output is not kept."""
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        if self.norm is not None:
            output = self.norm(output)
        return torch.add(residual, output.to(residual.dtype), alpha=self.multiplier)


class ParallelLayer(TransformerLayer):
    """A layer whose MLP reads what its attention reads, as Cohere's: x + attention(n(x)) + mlp(n(x))."""

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: [sq, b, h] to the same, and no cross-attention context."""
        after_attention, context = self._forward_attention(hidden_states, *args, **options)
        mlp_output_with_bias = self.mlp(self.input_layernorm(hidden_states))
        return self._forward_post_mlp(mlp_output_with_bias, after_attention), context
