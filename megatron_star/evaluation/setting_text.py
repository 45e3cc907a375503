"""Settings that are compared with each other, as written on a command line."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from megatron_star.config import MODES, OPTIONS, Option, StarConfig, parse_token_count

MOST_SHOWN = 4
_OPTIONS = {name: option for name, option in OPTIONS.items() if name != "mode"}


def parse_setting(text: str) -> StarConfig:
    """`exact`, `star`, `star block_size=1K`, `star passed_keys=64 block_size=512 anchor_size=64`, ...

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
    if name not in _OPTIONS or not equals:
        raise ValueError(f"{text!r} is not one of {', '.join(f'{name}=..' for name in _OPTIONS)}")
    option = _OPTIONS[name]
    try:
        return name, value if option.choices else option.parse(value)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error


def setting_name(star: StarConfig) -> str:
    """The shortest text that `parse_setting` reads as this setting; without what its mode ignores."""
    if star.block_size is not None and star.passed_keys == 0:
        star = replace(star, passed_keys=None)  # which means the same
    default = StarConfig(mode=star.mode)
    changed = [
        f"{name}={_value(option, getattr(star, name))}"
        for name, option in _OPTIONS.items()
        if star.mode not in option.ignored_by and getattr(star, name) != getattr(default, name)
    ]
    return " ".join([star.mode, *changed])


def encoded_as(star: StarConfig, planned: StarConfig) -> str:
    """The name of a setting once its mode and sizes are decided. Waves change no answer, and are left out."""
    return setting_name(replace(planned, wave_tokens=star.wave_tokens))


def what_was_chosen(setting: str, encoded: Collection[str]) -> str | None:
    """A sentence on a setting that left sizes or the mode open, from its `encoded_as`; else None."""
    chosen = sorted(name for name in encoded if name != setting)
    if not chosen:
        return None
    others = f", and {len(chosen) - MOST_SHOWN} others" if len(chosen) > MOST_SHOWN else ""
    return f"{setting!r} was {' or '.join(map(repr, chosen[:MOST_SHOWN]))}{others}."


def _value(option: Option, value: int | str) -> str:
    if not option.choices and option.parse is parse_token_count and value and value % 1024 == 0:
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
