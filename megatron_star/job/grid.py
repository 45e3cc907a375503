"""How many ranks share what: the sizes of a job's groups."""

from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import Any, Self

from megatron_star.parallel.groups import check_expert_sizes, check_world_size, default_expert_tp_size


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The sizes that `initialize_groups` takes, where each is explained."""

    tp_size: int
    cp_size: int
    ep_size: int = 1
    expert_tp_size: int | None = None

    @classmethod
    def of_arguments(cls, args: Namespace) -> Self:
        """What `add_model_arguments` reads."""
        return cls(
            tp_size=args.tensor_model_parallel_size,
            cp_size=args.context_parallel_size,
            ep_size=args.expert_model_parallel_size,
            expert_tp_size=args.expert_tensor_parallel_size,
        )

    @property
    def sizes(self) -> dict[str, Any]:
        """As keyword arguments."""
        return asdict(self)

    def check(self, world_size: int) -> None:
        """Raises ValueError unless so many ranks can be grouped so; before there are any groups."""
        check_world_size(world_size, tp_size=self.tp_size, cp_size=self.cp_size)
        expert_tp_size = self.expert_tp_size or default_expert_tp_size(self.tp_size, self.ep_size)
        check_expert_sizes(world_size, ep_size=self.ep_size, expert_tp_size=expert_tp_size)

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())
