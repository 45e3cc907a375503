"""Look after a context store: what is in it, and what shall not be; and put documents into it ahead of time.

    megatron-star contexts list --context-store DIR
    megatron-star contexts drop --context-store DIR 44e6e9 | --all
    torchrun --no-python --nproc-per-node 2 megatron-star contexts encode --context-store DIR \\
        --load CHECKPOINT --context-parallel-size 2 --context-file document.txt

The first two need no model and no ranks. `encode --help` lists its own options.
"""

import argparse
import runpy
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from megatron_star.job.argument_types import ArgumentParser, text_argument
from megatron_star.job.single_process import exit_on_user_errors
from megatron_star.store.folder import ContextFolder, StoredEntry
from megatron_star.store.manifest import DamagedEntry, Manifest

SHORTEST_NAME, SHOWN_DIGITS = 4, 12
HEADINGS = ("name", "tokens", "MB", "last used", "mask", "kept in", "ranks", "model")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("list", "drop", "encode"), help="encode runs on ranks")
    parser.add_argument(
        "names", nargs="*", type=text_argument, metavar="NAME", help="that are dropped, or how they begin"
    )
    parser.add_argument("--context-store", type=Path, required=True, metavar="DIR", help="the store's folder")
    parser.add_argument("--all", action="store_true", help="drop all contexts")
    args = parser.parse_intermixed_args(argv)  # names may come after --context-store
    if args.action == "list" and (args.names or args.all):
        parser.error("list takes no names, and lists all")
    if args.action == "drop" and bool(args.names) == args.all:
        parser.error("drop takes names, or --all")
    return args


def table(folder: ContextFolder) -> Iterator[str]:
    """A line for each context, the least recently used first, below a heading."""
    rows = [HEADINGS, *(_row(folder, entry) for entry in folder.entries())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(folder: ContextFolder, entry: StoredEntry) -> tuple[str, ...]:
    name, megabytes = entry.name[:SHOWN_DIGITS], f"{entry.num_bytes / 1e6:.1f}"
    used = f"{datetime.fromtimestamp(entry.last_use):%Y-%m-%d %H:%M}"
    try:
        manifest = folder.find(entry.name)
    except (OSError, DamagedEntry):
        manifest = None
    if manifest is None:
        return name, "?", megabytes, used, "damaged: the next that looks for it drops it", "", "", ""
    identity = manifest.identity
    start, end = identity["start"], identity["num_tokens"]
    tokens = f"{end}" if start == 0 else f"{start}..{end}"
    kept_in = identity["dtype"] if identity["kv_dtype"] == "auto" else identity["kv_dtype"]
    return name, tokens, megabytes, used, _mask(manifest), str(kept_in), str(manifest.cp_size), manifest.model


def _mask(manifest: Manifest) -> str:
    star = manifest.star
    if star["mode"] == "exact":
        return "exact"
    sizes = ("block_size", "anchor_size", "neighbor_blocks", "passed_keys")
    return " ".join(["star", *(f"{size}={star[size]}" for size in sizes if star[size])])


def drop(folder: ContextFolder, names: list[str]) -> int:
    """Drop the contexts whose names begin so, or all; returns how many.

    Raises:
        ValueError: a name is of none, or of several; nothing was dropped.
        OSError: the folder cannot be read or written.
    """
    there = [entry.name for entry in folder.entries()]
    chosen = [_one_of(there, name) for name in names] if names else there
    for name in chosen:
        if not folder.drop(name):
            raise OSError(f"{folder.path / name}: cannot be removed")
    return len(chosen)


def _one_of(there: list[str], beginning: str) -> str:
    found = [name for name in there if name.startswith(beginning)]
    if len(beginning) < SHORTEST_NAME or len(found) != 1:
        raise ValueError(
            f"{beginning!r} is the beginning of {len(found)} contexts: it must be of one, with at least "
            f"{SHORTEST_NAME} digits; `list` shows them"
        )
    return found[0]


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["encode"]:
        sys.argv = [f"{sys.argv[0]} encode", *sys.argv[2:]]
        runpy.run_module("megatron_star.programs.encode_contexts", run_name="__main__", alter_sys=False)
        return
    with exit_on_user_errors():
        args = parse_arguments()
        if not args.context_store.is_dir():
            raise ValueError(f"--context-store {args.context_store}: no such folder")
        folder = ContextFolder(args.context_store, 0)
        if args.action == "list":
            print("\n".join(table(folder)))
        else:
            print(f"{drop(folder, args.names)} contexts dropped")


if __name__ == "__main__":
    main()
