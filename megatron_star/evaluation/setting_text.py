"""Settings that are compared with each other, as written on a command line."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from megatron_star.config import MODES, StarConfig, parse_token_count

_PARSERS: dict[str, Callable[[str], Any]] = {
    "block_size": parse_token_count,
    "anchor_size": parse_token_count,
    "wave_tokens": parse_token_count,
    "neighbor_blocks": int,
    "anchor": str,
}


def parse_setting(text: str) -> StarConfig:
    """`exact`, `star block_size=1K`, `star block_size=512 anchor_size=0 neighbor_blocks=1`, ...

    Raises:
        ValueError: saying what is wrong in which setting.
    """
    mode, *options = text.split() or [""]
    try:
        if mode not in MODES:
            raise ValueError(f"it must begin with one of {', '.join(MODES)}")
        values = dict(_option(option) for option in options)
        if len(values) < len(options):
            raise ValueError("an option is set twice")
        return StarConfig(mode=mode, **values)
    except ValueError as error:
        raise ValueError(f"setting {text!r}: {error}") from error


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if name not in _PARSERS or not equals:
        raise ValueError(f"{text!r} is not one of {', '.join(f'{name}=..' for name in _PARSERS)}")
    try:
        return name, _PARSERS[name](value)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error


def setting_name(star: StarConfig) -> str:
    """The shortest text that `parse_setting` reads as this setting; `exact` ignores what only star uses."""
    default = StarConfig(mode=star.mode)
    ignored = {"mode"} if star.mode != "exact" else {"mode", *_PARSERS} - {"wave_tokens"}
    changed = [
        f"{field.name}={_value(getattr(star, field.name))}"
        for field in fields(star)
        if field.name not in ignored and getattr(star, field.name) != getattr(default, field.name)
    ]
    return " ".join([star.mode, *changed])


def _value(value: int | str) -> str:
    if isinstance(value, int) and value and value % 1024 == 0:
        return f"{value // 1024}K"
    return str(value)


def parse_settings(texts: Sequence[str]) -> dict[str, StarConfig]:
    """Several settings by name.

    Raises:
        ValueError: one is wrong, or two are the same.
    """
    settings = [parse_setting(text) for text in texts]
    named = {setting_name(star): star for star in settings}
    if len(named) < len(settings):
        raise ValueError(f"two of the settings are the same: {'; '.join(texts)}")
    return named
