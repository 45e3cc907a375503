"""megatron-star: context-parallel inference for Megatron-Core with Star Attention (arXiv 2411.17116)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_star.algorithm.context_encoding import encode_context
    from megatron_star.algorithm.star_model import attach
    from megatron_star.algorithm.token_generation import Sequence, generate_step
    from megatron_star.config import StarConfig
    from megatron_star.engine.engine import StarEngine
    from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
    from megatron_star.model.spec import with_star_attention
    from megatron_star.parallel.groups import StarGroups, initialize_groups
    from megatron_star.planning.plan import ContextPlan
    from megatron_star.speed.attach import with_speed

__version__ = "0.1.0"

__all__ = [
    "ContextPlan",
    "Sequence",
    "StarConfig",
    "StarEngine",
    "StarGroups",
    "attach",
    "encode_context",
    "generate_step",
    "initialize_groups",
    "use_cpu_where_cuda_is_absent",
    "with_speed",
    "with_star_attention",
]

_MODULES = {
    "ContextPlan": "megatron_star.planning.plan",
    "Sequence": "megatron_star.algorithm.token_generation",
    "StarConfig": "megatron_star.config",
    "StarEngine": "megatron_star.engine.engine",
    "StarGroups": "megatron_star.parallel.groups",
    "attach": "megatron_star.algorithm.star_model",
    "encode_context": "megatron_star.algorithm.context_encoding",
    "generate_step": "megatron_star.algorithm.token_generation",
    "initialize_groups": "megatron_star.parallel.groups",
    "use_cpu_where_cuda_is_absent": "megatron_star.model.cpu",
    "with_speed": "megatron_star.speed.attach",
    "with_star_attention": "megatron_star.model.spec",
}


def __getattr__(name: str) -> Any:
    """What users need, imported when it is first asked for: `import megatron_star` imports nothing else."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
