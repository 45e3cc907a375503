"""Which device a rank takes, and that no other rank has taken the same GPU."""

import torch
import torch.distributed as dist

from megatron_star.job.environment import RankEnvironment
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.parallel.control import SharedError, gather_integers

BACKENDS = ("nccl", "gloo")
HIGHEST_ID = (1 << 63) - 1


def take_device(environment: RankEnvironment, backend: str | None) -> tuple[torch.device, str]:
    """This rank's device, and the backend of the model's groups: `backend`, or NCCL on GPUs and gloo without.

    Over gloo, ranks may share a GPU: what they exchange goes through the host's memory, slowly.

    Raises:
        ValueError: this node has more ranks than GPUs, or NCCL is asked for without a GPU.
    """
    if not torch.cuda.is_available():
        if backend == "nccl":
            raise ValueError("--distributed-backend nccl needs a GPU for each rank, and there is none here")
        return use_cpu_where_cuda_is_absent(), "gloo"
    num_gpus = torch.cuda.device_count()
    index = environment.device_index(num_gpus, may_share=backend == "gloo")
    torch.cuda.set_device(index)
    return torch.device("cuda", index), backend or "nccl"


def check_gpus_differ(device: torch.device, backend: str, control: dist.ProcessGroup) -> None:
    """NCCL fails late, and not clearly, where two ranks have one GPU: compare them first.

    Raises:
        SharedError: on all ranks, if two of them have the same.
    """
    if device.type == "cuda" and backend == "nccl":
        ids = gather_integers(gpu_id(device), control)
        shared = [[rank for rank, other in enumerate(ids) if other == one] for one in ids]
        if ranks := next((ranks for ranks in shared if len(ranks) > 1), None):
            raise SharedError(
                f"ranks {', '.join(map(str, ranks))} have one and the same GPU, and NCCL wants one for each: "
                "give each its own (srun --gpus-per-task 1, or one rank per GPU under torchrun), or start "
                "with --distributed-backend gloo, which is slow"
            )


def gpu_id(device: torch.device) -> int:
    """A number of this GPU, the same in all processes and on all machines: of its UUID."""
    return int(str(torch.cuda.get_device_properties(device).uuid).replace("-", ""), 16) & HIGHEST_ID
