"""Sarvam 105B: DeepSeek V3's model with a configuration of its own."""

from dataclasses import replace

from checkpoints_tools.families.deepseek_v3 import DEEPSEEK_V3

SARVAM_MLA = replace(DEEPSEEK_V3, model_type="sarvam_mla", bridge_provider=None)
