"""What the programs' command lines are made of: a parser that raises, and types with bounds."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_star.checked_input import check_unicode
from megatron_star.config import parse_token_count
from megatron_star.help_formatter import HelpFormatter

MOST_COUNT, MOST_SEED = (1 << 31) - 1, (1 << 64) - 1
MOST_DIGITS, MOST_SHOWN = 30, 60
BYTES_OF_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


class ArgumentParser(argparse.ArgumentParser):
    """Raises on a wrong argument, so that one rank reports it and all end. Arguments are not abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError instead of printing the usage on every rank."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def _argument[T](convert: Callable[[str], T], text: str) -> T:
    try:
        return convert(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def text_argument(text: str) -> str:
    """An argument type: at least one character, all of them whole."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return _argument(lambda text: check_unicode(text, "the argument"), text)


def token_count(text: str) -> int:
    """An argument type: `4096`, `32K` or `1M`."""
    return _argument(parse_token_count, text)


def byte_count(text: str) -> int:
    """An argument type: `100GB`, `1.5TB` (powers of ten), or as `token_count`."""
    number, unit = text.strip(), ""
    for unit in BYTES_OF_UNITS:
        if number.upper().endswith(unit):
            return int(real_number(1e-9, 1e9)(number[: -len(unit)]) * BYTES_OF_UNITS[unit])
    return token_count(text)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """An argument type: from `least` to `most`."""

    def convert(text: str) -> int:
        number = int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else -1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"{_shown(text)} is not a whole number of at least {least} and at most {most}"
            )
        return number

    return convert


def real_number(
    least: float, most: float, *, what: str = "a number", or_zero: bool = False
) -> Callable[[str], float]:
    """An argument type: from `least` to `most`; with `or_zero`, also 0."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (least <= number <= most or (or_zero and number == 0)):
            zero = "0, or " if or_zero else ""
            raise argparse.ArgumentTypeError(
                f"{_shown(text)} is not {zero}{what} of at least {least:g} and at most {most:g}"
            )
        return number

    return convert


def _shown(text: str) -> str:
    return ascii(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}...")


count = whole_number(0, MOST_COUNT)
positive = whole_number(1, MOST_COUNT)
seed = whole_number(0, MOST_SEED)
