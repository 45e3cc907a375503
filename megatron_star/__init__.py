"""megatron-star: context-parallel inference for Megatron-Core with Star Attention (arXiv 2411.17116)."""

import warnings

__version__ = "0.1.0"

# Megatron-Core says at import that Apex is missing. Apex is optional and nothing here needs it.
warnings.filterwarnings("ignore", message="Apex is not installed")
