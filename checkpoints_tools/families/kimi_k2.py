"""Kimi K2: DeepSeek V3 under another name, of which transformers has no class."""

from dataclasses import replace

from checkpoints_tools.families.deepseek_v3 import DEEPSEEK_V3

KIMI_K2 = replace(DEEPSEEK_V3, model_type="kimi_k2", bridge_provider="KimiK2", config_of="deepseek_v3")
