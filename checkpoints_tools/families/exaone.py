"""EXAONE 3.0 and 3.5, which is Llama under another name."""

from dataclasses import replace

from checkpoints_tools.families.llama import LLAMA

EXAONE = replace(LLAMA, model_type="exaone", bridge_provider=None)
