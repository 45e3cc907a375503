"""What the commands have in common: errors in one line, progress, log lines of dependencies."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from megatron_star.help_formatter import HelpFormatter
from megatron_star.model.checkpoint import DTYPES

EXIT_MISMATCH = 1
EXIT_ERROR = 2
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"error: {message} (see `{self.prog} --help`)\n")


def command_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m checkpoints_tools.<module>`, or under the name of `megatron-star`."""
    named = sys.argv[0].startswith("megatron-star ")
    prog = sys.argv[0] if named else f"python -m checkpoints_tools.{module}"
    return _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter)


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, read with `dtype_option`."""
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, *_SHORT_DTYPES],
        help="dtype of the result; default: as in the checkpoint",
    )


def dtype_option(options: argparse.Namespace) -> torch.dtype | None:
    """The dtype of `--dtype`; None if it was not given."""
    if options.dtype is None:
        return None
    return DTYPES[_SHORT_DTYPES.get(options.dtype, options.dtype)]


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit; what users can put right is one line on stderr and status 2."""
    logging.getLogger("megatron").setLevel(logging.ERROR)  # "GPTModel IS DEPRECATED", at every model
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    try:
        status = main()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = EXIT_ERROR
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written to the output", file=sys.stderr)
        status = EXIT_ERROR
    sys.exit(status)


class _Lines:
    """A stream for tqdm that writes each state of the bar as a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total_bytes: int, description: str) -> tqdm:
    """A bar over bytes on a terminal; elsewhere a line now and then."""
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=total_bytes,
        desc=description,
        unit="B",
        unit_scale=True,
        mininterval=0.2 if on_terminal else 20.0,
        bar_format=None if on_terminal else "{desc}: {n_fmt} of {total_fmt}B, {elapsed} elapsed, {rate_fmt}",
        file=None if on_terminal else _Lines(),
    )
