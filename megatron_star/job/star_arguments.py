"""The command line's group of Star Attention: how a context is encoded."""

import argparse

from megatron_star.config import ANCHOR_TRANSFERS, MODES, StarConfig
from megatron_star.job.argument_types import count, token_count

DEFAULTS = StarConfig()


def add_star_arguments(parser: argparse.ArgumentParser) -> None:
    """How a context is encoded; `star_config` reads them."""
    group = parser.add_argument_group("Star Attention (token counts may be written 32K or 1M)")
    group.add_argument(
        "--star-mode",
        choices=MODES,
        default=DEFAULTS.mode,
        help="what a context token sees: anchor and own block, or everything; auto: whichever is cheaper",
    )
    group.add_argument(
        "--star-block-size",
        type=token_count,
        default=DEFAULTS.block_size,
        metavar="TOKENS",
        help="at most so many in a block",
    )
    group.add_argument(
        "--star-anchor-size",
        type=token_count,
        metavar="TOKENS",
        help="beginning of the context that all blocks see; default: as large as the first block",
    )
    group.add_argument(
        "--star-neighbor-blocks",
        type=count,
        default=DEFAULTS.neighbor_blocks,
        metavar="N",
        help="blocks before its own that a token sees, too",
    )
    group.add_argument(
        "--star-anchor",
        choices=ANCHOR_TRANSFERS,
        default=DEFAULTS.anchor,
        help="encode the anchor once and send its KV, or again for every block, as published",
    )
    group.add_argument(
        "--star-wave-tokens",
        type=token_count,
        default=DEFAULTS.wave_tokens,
        metavar="TOKENS",
        help="most context tokens that a rank encodes in one forward pass (without a GPU, never above 2K)",
    )


def star_config(args: argparse.Namespace) -> StarConfig:
    """The configuration that these arguments ask for; raises ValueError on a value out of bounds."""
    return StarConfig(
        mode=args.star_mode,
        block_size=args.star_block_size,
        anchor_size=args.star_anchor_size,
        neighbor_blocks=args.star_neighbor_blocks,
        anchor=args.star_anchor,
        wave_tokens=args.star_wave_tokens,
    )
