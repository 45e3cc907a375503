"""The stubs have the signatures of the libraries, read from their sources: nothing is imported.

`make te-check` puts all of them in place; elsewhere what is installed is checked.
"""

import ast
import inspect
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import kernel_stubs
import pytest

FUNCTIONS = [
    ("flash-attn", "flash_attn/flash_attn_interface.py", kernel_stubs.flash_attn_func),
    ("flash-attn", "flash_attn/flash_attn_interface.py", kernel_stubs.flash_attn_varlen_func),
    ("flash-attn", "flash_attn/flash_attn_interface.py", kernel_stubs.flash_attn_with_kvcache),
    ("flash-attn-4", "flash_attn/cute/interface.py", kernel_stubs.flash_attn_func_4),
    (
        "transformer-engine",
        "transformer_engine/pytorch/cpp_extensions/fused_attn.py",
        kernel_stubs.fused_attn_fwd,
    ),
]


@pytest.mark.parametrize(("package", "file", "stub"), FUNCTIONS)
def test_a_stub_has_the_signature_of_the_library(package, file, stub):
    assert _parameters_of_stub(stub) == _parameters_in(
        _source(package, file), stub.__name__.removesuffix("_4")
    )


def _source(package: str, file: str) -> Path:
    """Where a file of an installed package lies."""
    try:
        path = Path(str(metadata.distribution(package).locate_file(file)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: `make te-check` checks it")
    return path


def _parameters_in(path: Path, function: str) -> list[tuple[str, str | None]]:
    """Names and defaults in a source file."""
    tree = ast.parse(path.read_text())
    definition = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function
    )
    names = [argument.arg for argument in definition.args.args]
    defaults = [ast.unparse(default) for default in definition.args.defaults]
    return list(zip(names, [None] * (len(names) - len(defaults)) + defaults, strict=True))


def _parameters_of_stub(stub: Callable[..., object]) -> list[tuple[str, str | None]]:
    return [
        (name, None if parameter.default is parameter.empty else repr(parameter.default))
        for name, parameter in inspect.signature(stub).parameters.items()
    ]
