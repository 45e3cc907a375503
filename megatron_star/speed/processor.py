"""Which processor this is, where torch's libraries for a CPU differ in what they are fast at."""

from typing import Any

import torch

_CAPABILITIES: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()

IS_AMD = "AMD" in _CAPABILITIES.get("cpu_name", "")

MULTIPLIES_BFLOAT16: bool = _CAPABILITIES.get("avx512_bf16", False)
"""By instructions of its own, instead of widening to float32."""
