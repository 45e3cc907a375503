"""What `--help` of every program has in common."""

import argparse

from megatron_star.config import in_tokens

COUNTED = ("TOKENS", "BYTES")
"""Placeholders of what may be written 32K or 1M."""


class HelpFormatter(argparse.HelpFormatter):
    """States every default: that of the argument, unless its help says what the default is."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        given_or_nothing = action.required or not action.option_strings or action.default == argparse.SUPPRESS
        if given_or_nothing or "default: " in text:
            return text
        return f"{text}{'; ' if text else ''}default: {_shown(action)}"


def _shown(action: argparse.Action) -> str:
    if action.default in (None, [], ()):
        return "none"
    if isinstance(action.default, bool):
        return "not"
    if action.metavar in COUNTED:
        return in_tokens(action.default)
    return str(action.default).replace("%", "%%")
