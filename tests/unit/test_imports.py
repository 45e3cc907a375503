"""Imports point one way, as docs/architecture.md says.

Whatever names a module counts: an import anywhere in a file, a dotted name, a string for importlib or runpy.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOP_LEVEL = ("megatron_star", "checkpoints_tools", "benchmarks", "launch", "scripts")
BASE = ("config", "checked_input", "help_formatter", "quiet")
UP_TO_MODEL = (*BASE, "text", "planning", "attention", "parallel", "model")
UP_TO_ENGINE = (*UP_TO_MODEL, "algorithm", "speed", "store", "engine")
UP_TO_JOB = (*UP_TO_ENGINE, "job")
EVERYTHING = (
    *UP_TO_JOB,
    "megatron_star",
    "server",
    "evaluation",
    "checkpoints_tools",
    "programs",
    "benchmarks",
)

# A layer: what it may import besides itself. `megatron_star` is the package's own file, for users;
# what lies in it is named without it. A module that belongs to no layer fails.
LAYERS = {
    **{layer: UP_TO_JOB[:place] for place, layer in enumerate(UP_TO_JOB)},
    **dict.fromkeys(BASE, BASE),
    "megatron_star": UP_TO_ENGINE,
    "server": UP_TO_JOB,
    "evaluation": UP_TO_JOB,
    "checkpoints_tools": UP_TO_MODEL,
    "programs": (*UP_TO_JOB, "megatron_star", "server", "evaluation", "checkpoints_tools"),
    "benchmarks": EVERYTHING,
    "launch": ("programs",),
    "scripts": ("benchmarks",),
    "setup": ("attention", "server", "speed"),
}

# Of LIBRARIES, a layer that is named here imports these alone; another imports what it likes.
LIBRARIES = ("torch", "torch.distributed", "torch.distributed.checkpoint", "megatron", "transformers")
LIBRARIES_OF = {
    **dict.fromkeys((*BASE, "planning", "launch", "setup"), ()),
    "quiet": ("torch", "megatron"),  # names of their loggers
    "text": ("transformers",),
    "attention": ("torch",),
    "parallel": ("torch", "torch.distributed", "megatron"),
    "model": ("torch", "torch.distributed.checkpoint", "megatron"),
    "algorithm": ("torch", "megatron"),
    "server": ("megatron", "transformers"),
}

# Imported inside a function, since it may be missing: kernels' libraries alone.
OPTIONAL = ("flash_attn", "transformer_engine")
WITHOUT_TORCH = (
    "config",
    "checked_input",
    "help_formatter",
    "planning",
    "engine.llguidance_vocabulary",
    "engine.scheduler",
    "server.grammar_trial",
    "store.folder",
)


def name_of(path: Path) -> str:
    """How this test names a module: without `megatron_star.`; a folder is its `__init__`."""
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    return "megatron_star" if name == "megatron_star.__init__" else name.removeprefix("megatron_star.")


FILES = {
    name_of(path): path
    for path in sorted(
        [*REPOSITORY.glob("*.py"), *(p for top in TOP_LEVEL for p in (REPOSITORY / top).rglob("*.py"))]
    )
}


def layer_of(module: str) -> str | None:
    """The layer that a module of ours belongs to; None where it belongs to none, or is another's."""
    return next((layer for layer in LAYERS if module == layer or module.startswith(f"{layer}.")), None)


def module_named(dotted: str) -> str | None:
    """Our module that a dotted name lies in, as FILES names it: text.prompt for megatron_star.text.prompt.x.

    None where it is another's, and for the package's own `__version__` and `__file__`.
    """
    parts = dotted.split(".")
    if re.fullmatch(r"megatron_star(\.__\w+__)?", dotted):
        return None
    for length in range(len(parts), 0, -1):
        path = REPOSITORY.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file() and parts[0] in TOP_LEVEL:
            return name_of(path.with_suffix(".py"))
        if path.is_dir() and parts[0] in TOP_LEVEL:
            return name_of(path / "__init__.py")
    return None


def library_named(dotted: str) -> str | None:
    """The one of LIBRARIES that a dotted name lies in: the longest."""
    return max((x for x in LIBRARIES if f"{dotted}.".startswith(f"{x}.")), key=len, default=None)


def named_by(node: ast.AST) -> list[str]:
    """Dotted names of modules, or of what lies in one, that a piece of code names."""
    match node:
        case ast.Import():
            return [f"{alias.name}.{alias.asname}" if alias.asname else alias.name for alias in node.names]
        case ast.ImportFrom():
            assert node.level == 0, "a relative import"
            return [f"{node.module}.{alias.name}" for alias in node.names]
        case ast.Attribute():
            return [ast.unparse(node)]
        case ast.Constant(value=str(text)) if re.fullmatch(r"[a-z_0-9]+(\.\w+)+", text):
            return [] if module_named(text) == "megatron_star" else [text]  # a key of that name, say
        case _:
            return []


def uses(source: str) -> set[str]:
    """Modules of ours and libraries of LIBRARIES that a file names, wherever and however it does."""
    names = {name for node in ast.walk(ast.parse(source)) for name in named_by(node)}
    return {module_named(name) or library_named(name) for name in names} - {None}


@cache
def used_by(module: str) -> frozenset[str]:
    """`uses` of a file of ours."""
    return frozenset(uses(FILES[module].read_text()))


def is_allowed(module: str, used: str) -> bool:
    """Whether a module may name another of ours, or a library."""
    own = layer_of(module)
    if used in LIBRARIES:
        return own not in LIBRARIES_OF or used in LIBRARIES_OF[own]
    return layer_of(used) in (own, *LAYERS[own])


def test_every_module_belongs_to_a_layer_and_no_layer_is_empty():
    assert [module for module in FILES if layer_of(module) is None] == []
    assert set(LAYERS) - {layer_of(module) for module in FILES} == set()


def test_a_module_names_only_modules_of_its_own_layer_and_those_below():
    wrong = {(module, used) for module in FILES for used in used_by(module) if not is_allowed(module, used)}
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    open_modules, closed = [], set()

    def visit(module: str) -> None:
        assert module not in open_modules, (
            f"a circle: {[*open_modules[open_modules.index(module) :], module]}"
        )
        if module in closed:
            return
        open_modules.append(module)
        for used in used_by(module) & FILES.keys() - {module}:
            visit(used)
        closed.add(open_modules.pop())

    for module in FILES:
        visit(module)


def functions_imports(tree: ast.AST) -> set[str]:
    """What is imported inside functions."""
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    return {name for node in inside for name in named_by(node)}


def test_only_kernels_libraries_are_imported_inside_a_function():
    found = {
        (module, name) for module in FILES for name in functions_imports(ast.parse(FILES[module].read_text()))
    }
    assert {(module, name) for module, name in found if name.split(".")[0] not in OPTIONAL} == set()


HIDDEN = ("__import__", "exec", "eval", "spec_from_file_location", "exec_module", "run_path")


def hides_an_import(call: ast.Call) -> bool:
    """Whether a call may import what no dotted name tells; a model.eval() does not."""
    name = ast.unparse(call.func).split(".")[-1]
    if name in ("import_module", "run_module"):
        return not isinstance(call.args[0], ast.Constant | ast.Subscript)
    return name in HIDDEN and (isinstance(call.func, ast.Name) or name not in ("eval", "exec"))


def test_nothing_is_imported_in_a_way_that_this_test_does_not_see():
    hidden = {
        (module, ast.unparse(node))
        for module in FILES
        for node in ast.walk(ast.parse(FILES[module].read_text()))
        if isinstance(node, ast.Call) and hides_an_import(node)
    }
    assert hidden == set()


@pytest.mark.parametrize(
    "source, used",
    [
        ("import megatron_star.server.app", "server.app"),
        ("import megatron_star\nmegatron_star.server.app.x()", "server.app"),
        ("from megatron_star.server import app as a", "server.app"),
        ("from megatron_star.server.app import x", "server.app"),
        ("from megatron_star import server", "server.__init__"),
        ("from megatron_star import attach", "megatron_star"),
        ("import megatron_star as m", "megatron_star"),
        ("def f():\n  if x:\n    from megatron_star.server.app import x", "server.app"),
        ("if TYPE_CHECKING:\n  from megatron_star.server.app import x", "server.app"),
        ("importlib.import_module('megatron_star.server.app')", "server.app"),
        ("NAMES = {'serve': 'megatron_star.server.app'}\nrun_module(NAMES[n])", "server.app"),
        ("from launch import generate", "launch.generate"),
        ("import torch as t", "torch"),
        ("from torch import distributed", "torch.distributed"),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("from torch.distributed.nn import x", "torch.distributed"),
        ("from torch.distributed.checkpoint import load", "torch.distributed.checkpoint"),
        ("importlib.import_module('megatron.core')", "megatron"),
    ],
)
def test_every_way_to_name_a_module_is_seen(source, used):
    assert used in uses(source)


def test_planning_and_the_scheduler_run_without_torch_and_megatron():
    modules = [
        f"megatron_star.{m}" for m in FILES if m.startswith(WITHOUT_TORCH) and not m.endswith("__init__")
    ]
    code = (
        f"import sys, {', '.join(modules)}; print({{'torch', 'megatron', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def folder_map() -> list[tuple[list[str], str]]:
    """Rows of the first table of folders in docs/architecture.md: names, and what these may import."""
    lines = iter((REPOSITORY / "docs/architecture.md").read_text().splitlines())
    next(line for line in lines if line.startswith("| folder |"))
    next(lines)
    cells = [line.split("|")[1:-1] for line in takewhile(lambda line: line.startswith("|"), lines)]
    return [(re.findall("`(.+?)`", row[0]), row[-1].strip()) for row in cells]


def said_to_import(rows: list[tuple[list[str], str]], row: int) -> set[str]:
    """Names that the table lets the names of this row import."""
    names, says = rows[row]
    up_to = re.fullmatch("up to `(.+)`", says)
    last = (
        row
        if says == "all above"
        else 1 + next(i for i in range(row) if up_to[1] in rows[i][0])
        if up_to
        else 0
    )
    named = names if says == "each other" else re.findall("^`(.+?)`", says)
    return {name for above, _ in rows[:last] for name in above} | set(named)


def test_the_map_of_folders_has_each_folder_and_file_once_and_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    paths = [path.split("/") for path in tracked.stdout.splitlines()]
    there = {path[1] for path in paths if path[0] == "megatron_star"}
    there |= {path[0] for path in paths if len(path) > 1 and path[0][0] != "."} - {"megatron_star"}
    assert sorted(name for names, _ in folder_map() for name in names) == sorted(there)


def test_the_map_of_folders_says_what_each_may_import():
    rows, layers = folder_map(), {}
    for row, (names, says) in enumerate(rows):
        if says != "everything":
            layers |= dict.fromkeys(names, said_to_import(rows, row) | set(names))
    as_layer = {name: name.removesuffix(".py") for name in layers} | {"__init__.py": "megatron_star"}
    found = {as_layer[name]: {as_layer[other] for other in layers[name]} for name in layers}
    assert found == {layer: {layer, *allowed} for layer, allowed in LAYERS.items() if layer != "setup"}
