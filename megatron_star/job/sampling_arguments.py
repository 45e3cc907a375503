"""The command line's group of sampling: how tokens are chosen."""

import argparse

from megatron.core.inference.sampling_params import SamplingParams

from megatron_star.config import DEFAULT_SPECULATE, SPECULATE
from megatron_star.job.argument_types import count, positive, real_number, seed, text_argument

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3
"""A share of them times any logit is a number in float32; below, sampling is greedy for all purposes."""


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen; `sampling_params` reads them."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--num-tokens-to-generate", type=positive, default=64, metavar="N", help="at most so many"
    )
    group.add_argument(
        "--temperature",
        type=real_number(LEAST_TEMPERATURE, MOST_TEMPERATURE, or_zero=True),
        default=1.0,
        metavar="T",
        help="0 is greedy",
    )
    group.add_argument("--top-k", type=count, default=0, metavar="K", help="1 is greedy, 0 is off")
    group.add_argument("--top-p", type=real_number(0, 1), default=0.0, metavar="P", help="0 is off")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of the random choice of tokens")
    group.add_argument(
        "--stop",
        type=text_argument,
        action="append",
        default=[],
        metavar="TEXT",
        help="end at this text; may be repeated",
    )
    add_speculate_argument(group)


def add_speculate_argument(group: argparse._ArgumentGroup) -> None:
    """How tokens are guessed; for any program that generates."""
    group.add_argument(
        "--speculate",
        choices=SPECULATE,
        default=DEFAULT_SPECULATE,
        help="verify several tokens a step, where that pays: those that followed the last ones before, in "
        "context, query or answer; no token changes",
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Megatron's sampling parameters of these arguments."""
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_tokens_to_generate=args.num_tokens_to_generate,
        stop_words=args.stop or None,
    )
