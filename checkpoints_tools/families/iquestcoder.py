"""IQuest-Coder, which is Llama under another name."""

from dataclasses import replace

from checkpoints_tools.families.llama import LLAMA

IQUESTCODER = replace(LLAMA, model_type="iquestcoder", bridge_provider=None)
