"""Imports point one way, and nothing is imported inside a function but an optional kernel library."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LAYERS = [
    "megatron_star.config",
    "megatron_star.help_formatter",
    "megatron_star.planning.plan",
    "megatron_star.planning.reads",
    "megatron_star.planning.hardware",
    "megatron_star.planning.cost_model",
    "megatron_star.attention",
    "megatron_star.parallel",
    "megatron_star.model",
    "megatron_star.inference",
    "megatron_star.server",
    "megatron_star.evaluation",
    "launch",
]
ALLOWED_EXTRA = {"checkpoints_tools": LAYERS[:9], "benchmarks": LAYERS}
FILES = sorted(
    path
    for folder in ("megatron_star", "launch", "checkpoints_tools")
    for path in (REPOSITORY / folder).rglob("*.py")
)


def layer_of(module: str) -> str | None:
    """The layer that a module belongs to."""
    return next((layer for layer in LAYERS if module == layer or module.startswith(layer + ".")), None)


def imported_modules(path: Path) -> list[str]:
    """Modules that a file imports."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.append(node.module)
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_imports_only_from_its_own_layer_and_those_below(path):
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    own = layer_of(module)
    allowed = ALLOWED_EXTRA.get(module.split(".")[0]) or (LAYERS[: LAYERS.index(own) + 1] if own else [])
    for imported in imported_modules(path):
        layer = layer_of(imported)
        assert layer is None or layer in allowed, f"{module} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_torch_and_megatron_stay_in_the_layers_that_may_know_them(path):
    own = layer_of(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    imported = {module.split(".")[0] for module in imported_modules(path)}
    if own in LAYERS[:6]:
        assert not imported & {"torch", "megatron", "transformers"}
    if own == "megatron_star.attention":
        assert "megatron" not in imported
        assert "torch.distributed" not in imported_modules(path)
