"""Llama 2, 3, 3.1, 3.2, 3.3, and SmolLM2."""

from checkpoints_tools.families.family import Family

LLAMA = Family("llama", bridge_provider="CodeLlama|Llama(2|3|31|32)?")
