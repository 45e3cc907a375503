"""The context store that a job's command line asks for, on every rank."""

import argparse
import hashlib
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_star.algorithm.star_model import StarModel
from megatron_star.engine.context_store import ContextStore
from megatron_star.engine.rank_store import RankStore
from megatron_star.job.code_version import FOLDER, PACKAGES, code_fingerprint, package_versions
from megatron_star.job.progress import heartbeat
from megatron_star.model.checkpoint import CheckpointInfo, weights_directory
from megatron_star.model.weight_hashes import hash_files, root_hash
from megatron_star.parallel.control import from_driver, on_driver, on_every_rank
from megatron_star.parallel.groups import StarGroups
from megatron_star.store.folder import ContextFolder

Stores = tuple[ContextStore | None, RankStore]
"""The driver's, and this rank's part of it; workers have only that."""


def open_context_store(
    args: argparse.Namespace, info: CheckpointInfo, star_model: StarModel, groups: StarGroups
) -> Stores | None:
    """None without `--context-store`; called on all ranks together.

    A folder that cannot be written to is only read from, and whoever started the job is told so.

    Raises:
        SharedError: on all ranks, if the folder cannot be made or read, or is not the same for all of them.
    """
    if args.context_store is None:
        return None
    folder = ContextFolder(Path(args.context_store).absolute(), args.context_store_bytes)
    from_driver(lambda: _make(folder), groups.control)
    _check_shared(folder, groups)

    def store() -> ContextStore:
        facts = {"kv_dtype": star_model.kv_format.name, **facts_of_contexts(args, info)}
        sizes = {"cp_size": groups.cp.size(), "tp_size": groups.model.tp.size()}
        return ContextStore(folder, facts, model=info.directory.resolve().name, **sizes)

    return on_driver(store, groups.control), RankStore(folder.path, star_model, groups.model.tp.rank())


def facts_of_contexts(args: argparse.Namespace, info: CheckpointInfo) -> Mapping[str, str]:
    """What two jobs must have in common, besides tokens and mask, to have the same contexts.

    The weights' hash is the recorded one, if weights were compared with it; else that of the files as they
    are.
    """
    if info.weight_files and not args.no_verify_weights:
        weights = root_hash(info.weight_files)
    else:
        paths = sorted(path for path in weights_directory(info.directory).iterdir() if path.is_file())
        names = [str(path.relative_to(info.directory)) for path in paths]
        with heartbeat(f"hashing the weights of {info.directory}, for --context-store"):
            weights = root_hash(hash_files(info.directory, names, lambda num_bytes: None))
    model = repr((sorted(info.args.items()), info.family))
    return {
        "weights": weights,
        "arguments": hashlib.sha256(model.encode()).hexdigest(),
        "dtype": str(args.dtype or info.dtype).removeprefix("torch."),
        "code": code_fingerprint(FOLDER),
        **package_versions(PACKAGES),
    }


def _make(folder: ContextFolder) -> None:
    """On the driver."""
    folder.make()
    if not folder.is_writable:
        print(
            f"warning: {folder.path}: cannot be written to: contexts are read from it, and none is added",
            file=sys.stderr,
        )


def _check_shared(folder: ContextFolder, groups: StarGroups) -> None:
    """A file that the driver makes must be there on all ranks."""
    if not from_driver(lambda: folder.is_writable, groups.control):
        return
    name = from_driver(lambda: f".probe-{secrets.token_hex(8)}", groups.control)
    probe = folder.path / name
    on_driver(probe.touch, groups.control)

    def check() -> None:
        if not probe.exists():
            raise ValueError(f"--context-store {folder.path} is not the same folder here as on rank 0")

    try:
        on_every_rank(check, groups.control)
    finally:
        on_driver(lambda: probe.unlink(missing_ok=True), groups.control)
