"""Process groups: Megatron's TP groups as they are; our CP ranks are data-parallel replicas to Megatron.

Context parallelism stays off inside Megatron, which would cut rotary embeddings in zigzag halves for it. The
ranks that share a context hold the same weights, so they are what Megatron calls a data-parallel group.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_star.parallel.watch import RankWatch

AS_LONG_AS_IT_TAKES = timedelta(days=365)
"""Of the control group: workers wait in it while the driver reads, tokenizes or idles."""


@dataclass(frozen=True)
class StarGroups:
    """The groups of one rank.

    Attributes:
        model: the groups that the Megatron model is built with; its `cp` holds this rank alone.
        cp: the ranks that share a context.
        control: all ranks over gloo, for requests, tokens and errors; apart from the model's traffic. A rank
            waits there for as long as the driver has something else to do.
        watch: of all ranks of a job; it ends what waits for one that is lost.
    """

    model: ProcessGroupCollection
    cp: dist.ProcessGroup
    control: dist.ProcessGroup
    watch: RankWatch | None = None


def initialize_groups(
    *,
    tp_size: int,
    cp_size: int,
    ep_size: int = 1,
    expert_tp_size: int | None = None,
    timeout: timedelta = timedelta(minutes=10),
) -> StarGroups:
    """Create the groups with Megatron's rank order (TP fastest, then CP).

    `torch.distributed` must be initialised with tp_size * cp_size ranks. `timeout` is of the model's groups.

    Args:
        ep_size: ranks over which the experts of a layer are spread, of all TP x CP.
        expert_tp_size: ranks over which each expert is cut; by default as many as TP has where experts are
            not spread, else 1.

    Raises:
        ValueError: another number of ranks, or one over which experts cannot be spread so.
    """
    check_world_size(dist.get_world_size(), tp_size=tp_size, cp_size=cp_size)
    expert_tp_size = expert_tp_size or default_expert_tp_size(tp_size, ep_size)
    check_expert_sizes(tp_size * cp_size, ep_size=ep_size, expert_tp_size=expert_tp_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size,
        expert_model_parallel_size=ep_size,
        expert_tensor_parallel_size=expert_tp_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
    )
    model = ProcessGroupCollection.use_mpu_process_groups()
    assert model.cp.size() == 1 and model.dp.size() == cp_size
    control = dist.new_group(backend="gloo", timeout=AS_LONG_AS_IT_TAKES)
    return StarGroups(model=model, cp=model.dp, control=control)


def check_world_size(world_size: int, *, tp_size: int, cp_size: int) -> None:
    """Raises ValueError unless there is one rank for each place of the TP x CP grid."""
    if tp_size * cp_size != world_size:
        raise ValueError(
            f"tensor-parallel size {tp_size} x context-parallel size {cp_size} needs {tp_size * cp_size} "
            f"ranks, but {world_size} were started"
        )


def default_expert_tp_size(tp_size: int, ep_size: int) -> int:
    """Over how many ranks an expert is cut unless the user says it."""
    return tp_size if ep_size == 1 else 1


def check_expert_sizes(world_size: int, *, ep_size: int, expert_tp_size: int) -> None:
    """Raises ValueError unless each place of the expert grid has the same number of ranks."""
    if world_size % (ep_size * expert_tp_size):
        raise ValueError(
            f"expert-parallel size {ep_size} x expert-tensor-parallel size {expert_tp_size} must divide the "
            f"{world_size} ranks (tensor-parallel x context-parallel size)"
        )


def are_same_ranks(group: dist.ProcessGroup, other: dist.ProcessGroup) -> bool:
    """Whether two groups, which both have this rank, have the same ranks."""
    return dist.get_process_group_ranks(group) == dist.get_process_group_ranks(other)


def destroy_groups() -> None:
    """Tear down Megatron's groups and torch.distributed."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
