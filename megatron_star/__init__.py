"""megatron-star: context-parallel inference for Megatron-Core with Star Attention (arXiv 2411.17116)."""

import logging
import warnings

__version__ = "0.1.0"

# What dependencies say at import or construction, and a user of this package can do nothing about: optional
# packages that nothing here needs, and a model class that Megatron plans to replace.
for _message in (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "absl.logging is not installed",
    "full scope is deprecated",
    "Only transformer-engine>=1.7.0 supports MoE experts",
):
    warnings.filterwarnings("ignore", message=_message)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
