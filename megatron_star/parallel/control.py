"""The control plane between the driver (global rank 0) and the workers: small messages, gloo, no pickle."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_star.parallel.all_gather import all_gather_single

DRIVER = 0


class SharedError(ValueError):
    """An error of the user's input that every rank raises, with the same message."""


def is_driver(control: dist.ProcessGroup) -> bool:
    """Whether this rank is the driver; before there is a group, `RankEnvironment.is_driver` says it."""
    return control.rank() == DRIVER


def broadcast_json(message: Any, control: dist.ProcessGroup) -> Any:
    """The driver's message on every rank; what the workers pass is ignored. It must survive JSON."""
    payload = torch.tensor(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    size = torch.tensor([payload.numel()])
    dist.broadcast(size, DRIVER, group=control)
    if not is_driver(control):
        payload = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(payload, DRIVER, group=control)
    return json.loads(payload.numpy().tobytes())


def broadcast_token_ids(token_ids: list[int], control: dist.ProcessGroup) -> list[int]:
    """The driver's token ids on every rank; workers pass a list of the same length."""
    tensor = torch.tensor(token_ids, dtype=torch.int64)
    dist.broadcast(tensor, DRIVER, group=control)
    return tensor.tolist()


def gather_integers(value: int, control: dist.ProcessGroup) -> list[int]:
    """Every rank's value, on every rank, in the order of the ranks."""
    everyone = torch.empty(control.size(), dtype=torch.int64)
    all_gather_single(everyone, torch.tensor([value]), group=control)
    return everyone.tolist()


def sum_on_driver(counts: torch.Tensor, control: dist.ProcessGroup) -> torch.Tensor:
    """The sum of every rank's counts, which are on the CPU and of one shape; of use on the driver only."""
    total = counts.clone()
    dist.reduce(total, DRIVER, group=control)
    return total


def largest_on_driver(values: torch.Tensor, control: dist.ProcessGroup) -> torch.Tensor:
    """The same of the largest value of any rank."""
    largest = values.clone()
    dist.reduce(largest, DRIVER, dist.ReduceOp.MAX, group=control)
    return largest


def from_driver[T](function: Callable[[], T], control: dist.ProcessGroup) -> T:
    """What `function`, run on the driver alone, returns. It must survive JSON.

    Raises:
        SharedError: on every rank, with the message of the ValueError or OSError that the driver met.
    """
    message: dict[str, Any] = {}
    if is_driver(control):
        try:
            message = {"result": function()}
        except (ValueError, OSError) as error:
            message = {"error": describe(error)}
    message = broadcast_json(message, control)
    if "error" in message:
        raise SharedError(message["error"])
    return message["result"]


def on_driver[T](function: Callable[[], T], control: dist.ProcessGroup) -> T | None:
    """What `function` returns, on the driver, which alone runs it and keeps it; None on the workers.

    Raises:
        SharedError: on every rank, with the message of the ValueError or OSError that the driver met.
    """
    results: list[T] = []
    from_driver(lambda: results.append(function()), control)
    return results[0] if results else None


def on_every_rank[T](function: Callable[[], T], control: dist.ProcessGroup) -> T:
    """What `function` returns on this rank, once it has succeeded on every rank.

    Raises:
        SharedError: on every rank, if it failed on any; with the first such rank's message.
    """
    result, failure = None, ""
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = describe(error)
    failed = gather_integers(int(bool(failure)), control)
    if any(failed):
        first = failed.index(1)
        raise SharedError(_message_from(first, failure, control, alone=sum(failed) < len(failed)))
    return result


def _message_from(rank: int, message: str, control: dist.ProcessGroup, *, alone: bool) -> str:
    payload = torch.zeros(4096, dtype=torch.uint8)
    text = (f"rank {rank}: {message}" if alone else message).encode()[:4096]
    payload[: len(text)] = torch.tensor(bytearray(text), dtype=torch.uint8)
    dist.broadcast(payload, rank, group=control)
    return payload.numpy().tobytes().rstrip(b"\0").decode(errors="replace")


def describe(error: Exception) -> str:
    """One line on an error of the user's input, never empty; the file's name for an OSError."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
