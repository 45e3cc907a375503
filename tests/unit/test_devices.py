"""Each rank has a GPU of its own, or says over gloo that it shares one."""

import pytest
import torch
from distributed import run_ranks
from ranks import gpus_that_differ

from megatron_star.job.devices import gpu_id, take_device
from megatron_star.job.environment import RankEnvironment


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes this look like a process that sees so many GPUs; what it then takes."""
    taken = []

    def pretend(count: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        return taken

    return pretend


def rank(local_rank: int) -> RankEnvironment:
    return RankEnvironment(local_rank, 8, local_rank, 8, "n1", 1)


def test_ranks_take_gpus_in_order_over_nccl_and_go_round_only_over_gloo(gpus):
    taken = gpus(4)
    assert take_device(rank(3), None) == (torch.device("cuda", 3), "nccl")
    assert take_device(rank(6), "gloo") == (torch.device("cuda", 2), "gloo")
    assert taken == [3, 2]
    with pytest.raises(ValueError, match="8 ranks were started on a node that shows 4 GPUs"):
        take_device(rank(6), "nccl")


def test_nccl_without_a_gpu_is_refused(gpus):
    gpus(0)
    with pytest.raises(ValueError, match="nccl needs a GPU"):
        take_device(rank(0), "nccl")


@pytest.mark.parametrize(("backend", "uuids"), [("nccl", "ab"), ("gloo", "aa")])
def test_ranks_with_gpus_of_their_own_or_over_gloo_may_go_on(backend, uuids):
    assert run_ranks(2, gpus_that_differ, uuids, backend) == ["", ""]


def test_ranks_that_see_the_same_gpu_are_named_on_every_rank():
    for message in run_ranks(3, gpus_that_differ, "aba", "nccl"):
        assert "ranks 0, 2 have one and the same GPU" in message and "--distributed-backend gloo" in message


def test_a_gpus_number_is_of_its_whole_uuid(monkeypatch):
    class Properties:
        uuid = "bd1a6dd3-6ee8-8bbd-0c1c-5c5b1e3a1f07"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    one = gpu_id(torch.device("cuda", 0))
    Properties.uuid = "bd1a6dd3-6ee8-8bbd-0c1c-5c5b1e3a1f08"
    assert 0 <= one < 1 << 63 and one != gpu_id(torch.device("cuda", 0))
