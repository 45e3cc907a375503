"""OLMo 3: OLMo 2 with a sliding window in the layers that `layer_types` says, where YaRN is left out."""

from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.olmo2 import OLMO_LAYER, olmo_arguments

OLMO3 = Family(
    "olmo3",
    arguments=olmo_arguments,
    neutral=neutral_but("attention_bias"),
    windows=IN_SOME_LAYERS,
    layer=OLMO_LAYER,
)
