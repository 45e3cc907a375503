"""docs/serving.md has every flag of the server, with the default that `--help` states."""

import re
from pathlib import Path

import pytest

from megatron_star.programs import serve

SERVING = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
FLAG = re.compile(r"--[a-z0-9-]+")


def documented_flags() -> dict[str, str]:
    """Each flag of the tables in the section "Flags", and its default there."""
    section = SERVING.read_text().split("\n## Flags\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `--")]
    return {flag: default.strip() for flags, default in rows for flag in FLAG.findall(flags)}


def stated_flags(monkeypatch, capsys) -> dict[str, str | None]:
    """Each flag that `--help` has, and its default where that is one word."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        serve.parse_arguments(["--help"])
    found = {}
    for entry in re.split(r"\n  (?=--)", capsys.readouterr().out.split("\n\n", 2)[2])[1:]:
        default = re.search(r"default: (\S+)$", entry.split("\n\n")[0])
        found[FLAG.match(entry)[0]] = default and default[1].removesuffix(".0")
    return found


def test_every_flag_of_the_server_is_documented_with_its_default(monkeypatch, capsys):
    documented, stated = documented_flags(), stated_flags(monkeypatch, capsys)
    assert documented.keys() == stated.keys()
    assert {flag: documented[flag] for flag, default in stated.items() if default} == {
        flag: default for flag, default in stated.items() if default
    }
