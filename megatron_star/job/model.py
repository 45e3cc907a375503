"""From arguments to a loaded model and its memory budget, on every rank of a job."""

import argparse
import sys

import torch

from megatron_star.algorithm.star_model import StarModel
from megatron_star.job.environment import RankEnvironment
from megatron_star.job.loading import load_star_model
from megatron_star.job.memory import default_kv_budget
from megatron_star.model.checkpoint import CheckpointInfo
from megatron_star.model.weight_hashes import Share
from megatron_star.parallel.control import DRIVER, SharedError, gather_integers, on_every_rank
from megatron_star.parallel.groups import StarGroups


def load_model(
    args: argparse.Namespace,
    info: CheckpointInfo,
    groups: StarGroups,
    device: torch.device,
    environment: RankEnvironment,
) -> StarModel:
    """The model that the arguments ask for; raises SharedError on all ranks if one of them cannot."""
    if args.compile_decode and groups.control.rank() == DRIVER:
        sizes = ", ".join(map(str, args.compile_decode))
        print(f"compiling the layers for {sizes} sequences, which takes a while", file=sys.stderr, flush=True)
    here = Share(environment.local_rank, environment.local_world_size)
    return load_star_model(
        info,
        groups,
        device=device,
        dtype=args.dtype or info.dtype,
        kernel=args.star_attention_kernel,
        transformer_impl=args.transformer_impl,
        decode_weights=args.decode_weights,
        compiled_rows=args.compile_decode,
        verify_weights=None if args.no_verify_weights else here,
    )


def kv_budget(
    args: argparse.Namespace, environment: RankEnvironment, groups: StarGroups, device: torch.device
) -> int:
    """Bytes of KV that every rank has room for; raises SharedError, on all ranks, if there is none."""
    if args.star_kv_gigabytes is not None:
        if not 0 < args.star_kv_gigabytes < float("inf"):
            raise SharedError(f"--star-kv-gigabytes is {args.star_kv_gigabytes}: it must be more than 0")
        return int(args.star_kv_gigabytes * 1e9)
    ranks_here = environment.local_world_size
    mine = on_every_rank(lambda: default_kv_budget(device, ranks_here), groups.control)
    budgets = gather_integers(mine, groups.control)
    if min(budgets) == 0:
        raise SharedError(
            f"rank {budgets.index(0)} has no memory left for KV, within the limits of its machine, control "
            "group (Slurm, container) and process (ulimit): use more ranks, or set --star-kv-gigabytes"
        )
    return min(budgets)
