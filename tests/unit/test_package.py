"""`import megatron_star` does nothing to its host, and gives a user all names that it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_star

REPOSITORY = Path(__file__).parents[2]
COMPARED = """
import logging, sys, warnings

def state():
    loggers = {name: vars(logging.getLogger(name))["level"] for name in list(logging.root.manager.loggerDict)}
    return list(warnings.filters), loggers, logging.root.level, list(logging.root.handlers)

before = state()
import megatron_star
assert state() == before, "filters or loggers have changed"
loaded = {"torch", "megatron", "transformers", "numpy"} & set(sys.modules)
assert not loaded, f"imported: {loaded}"
"""


def test_importing_the_package_leaves_warnings_and_loggers_alone_and_is_cheap():
    subprocess.run([sys.executable, "-c", COMPARED], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize("name", megatron_star.__all__)
def test_every_promised_name_is_there(name):
    assert getattr(megatron_star, name).__name__ == name
    assert name in dir(megatron_star)


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'attatch'"):
        _ = megatron_star.attatch
