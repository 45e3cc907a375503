"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, a part of each head rotated, longrope."""

from functools import partial

from checkpoints_tools.families.arguments import decoder_arguments
from checkpoints_tools.families.family import IN_ALL_LAYERS, Family
from checkpoints_tools.families.weights import attention, gated_mlp, norms

PHI3 = Family(
    "phi3",
    arguments=partial(decoder_arguments, reads_partial=True),
    windows=IN_ALL_LAYERS,
    layer=(*norms(), *attention(fused="qkv_proj"), *gated_mlp(fused="gate_up_proj")),
)
