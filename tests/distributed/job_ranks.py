"""What ranks do in the tests of a job's agreement, importable by their processes."""

from datetime import timedelta
from time import sleep

import torch
import torch.distributed as dist
from ranks import TIMEOUT, load

from megatron_star.engine.engine import StarEngine
from megatron_star.job.job import Job
from megatron_star.job.loading import check_same_weights, load_star_model
from megatron_star.job.running import run_engine
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.parallel.control import SharedError, from_driver
from megatron_star.parallel.groups import initialize_groups

SHORT = timedelta(seconds=1)


def loads_of(checkpoints: list[str], kernels: list[str], compiled_rows: list[tuple[int, ...]]) -> str:
    """The message of a load in which each rank has a checkpoint, a kernel and numbers of its own."""
    rank, device = dist.get_rank(), use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=1, cp_size=dist.get_world_size(), timeout=TIMEOUT)
    info = read_checkpoint_info(checkpoints[rank])
    try:
        load_star_model(
            info,
            groups,
            device=device,
            dtype=torch.float32,
            kernel=kernels[rank],
            decode_weights="auto",
            compiled_rows=compiled_rows[rank],
        )
    except SharedError as error:
        return str(error)
    return "loaded"


def weights_compared(tp_size: int, changed: int | None) -> str:
    """The message of a comparison of weights, of which this rank's are changed by one bit, or "the same"."""
    rank, cp_size = dist.get_rank(), dist.get_world_size() // tp_size
    groups = initialize_groups(tp_size=tp_size, cp_size=cp_size, timeout=TIMEOUT)
    model = torch.nn.Linear(300, 200)
    torch.manual_seed(rank % tp_size)  # each TP rank holds another part
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    if rank == 1:
        model.weight.data = model.weight.data.t().contiguous().t()  # laid out otherwise
    if rank == changed:
        model.weight.data.view(torch.int32)[3, 4] ^= 1
    try:
        check_same_weights(model, groups)
    except SharedError as error:
        return str(error)
    return "the same"


def driver_takes_its_time() -> str:
    """What workers get from a driver that works for longer than the groups' timeout."""
    groups = initialize_groups(tp_size=1, cp_size=dist.get_world_size(), timeout=SHORT)

    def work() -> str:
        sleep(2.5 * SHORT.total_seconds())
        return "done"

    return from_driver(work, groups.control)


def engine_used(checkpoint: str, fails: bool) -> list[str]:
    """What `use` of an engine got here, or the message where `prepare` fails."""
    star_model, groups = load(checkpoint, 1)
    job, got = Job(groups, read_checkpoint_info(checkpoint), star_model, 1 << 20, None), []

    def prepare(engine: StarEngine) -> str:
        if fails:
            raise ValueError("no such document")
        return f"documents for {engine.max_sequence_length} tokens"

    try:
        run_engine(job, prepare, lambda _, prepared: got.append(prepared), max_running=1)
    except SharedError as error:
        return [str(error)]
    return got
