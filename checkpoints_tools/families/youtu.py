"""Youtu-LLM: DeepSeek V3's attention with a dense MLP in all layers."""

from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.latent_attention import latent_attention, latent_attention_arguments
from checkpoints_tools.families.weights import DENSE_MLP

YOUTU = Family(
    "youtu",
    arguments=latent_attention_arguments,
    neutral={**neutral_but(), "rope_interleave": (True,)},
    layer=(*latent_attention(), *DENSE_MLP),
)
