"""What becomes of a model's logits after its output layer and Megatron's scale."""

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_star.model.transformer_config import own_field


def soft_capped(logits: Tensor, config: TransformerConfig) -> Tensor:
    """softcap * tanh(logit / softcap), in the dtype of the logits, where the model has a soft cap."""
    softcap = own_field(config, "logits_softcap")
    return logits if softcap is None else (logits / softcap).tanh() * softcap
