"""The command line's group of Star Attention: how a context is encoded."""

import argparse

from megatron_star.config import OPTIONS, StarConfig, parse_token_count
from megatron_star.job.argument_types import count, token_count

DEFAULTS = StarConfig()
_TYPES = {parse_token_count: token_count, int: count}


def add_star_arguments(parser: argparse.ArgumentParser) -> None:
    """How a context is encoded; `star_config` reads them."""
    group = parser.add_argument_group("Star Attention (token counts may be written 32K or 1M)")
    for name, option in OPTIONS.items():
        number = {"type": _TYPES[option.parse], "metavar": option.placeholder} if not option.choices else {}
        group.add_argument(
            f"--star-{name.replace('_', '-')}",
            default=getattr(DEFAULTS, name),
            choices=option.choices or None,
            help=option.help,
            **number,
        )


def star_config(args: argparse.Namespace) -> StarConfig:
    """The configuration that these arguments ask for; raises ValueError on a value out of bounds."""
    return StarConfig(**{name: getattr(args, f"star_{name}") for name in OPTIONS})
