"""InternLM 3, which is Llama under another name."""

from dataclasses import replace

from checkpoints_tools.families.llama import LLAMA

INTERNLM3 = replace(LLAMA, model_type="internlm3", bridge_provider=None)
