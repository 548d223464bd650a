"""Who may import whom: modules import only from lower levels, and never in a circle."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "python" / "halfbyte"

# From the top to the bottom. A module may import any level below its own, and its own level
# without a circle; a folder counts as one module.
LEVELS = [
    {"__init__", "__main__"},
    {"cli", "demo", "doctor"},
    {"chat", "serve"},
    {"train", "generate"},
    {"engine"},
    {"scheduler"},
    {"decode", "prefill"},
    {"adapters", "capture"},
    {"sampling", "reply", "prefix_cache", "grammar"},
    {"checkpoint", "data", "optim", "pager", "plan", "pressure"},
    {"lora", "peft", "fingerprint", "models"},
    {"linear", "kv_cache", "offload", "recording", "tokenizer"},
    {"ops"},
    {"errors", "_core"},
]
LEVEL = {name: depth for depth, names in enumerate(LEVELS) for name in names}

# `import halfbyte` stays quick because only these are imported when a module is.
IMPORTED_EAGERLY = {"halfbyte", "numpy", "torch"}
# These build on a library's classes; they are themselves imported inside functions.
BUILT_ON = {
    "halfbyte.cli": {"typer"},
    "halfbyte.tokenizer.sandbox": {"jinja2"},
    "halfbyte.serve.app": {"fastapi", "pydantic", "starlette"},
    "halfbyte.serve.metrics": {"prometheus_client"},
    "halfbyte.serve.schema": {"pydantic"},
    "halfbyte.serve.server": {"uvicorn"},
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """halfbyte/ops/library.py -> halfbyte.ops.library; a folder's __init__ -> the folder."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(("halfbyte", *parts)).removesuffix(".__init__")


def top(module: str) -> str:
    """The first name inside the package: halfbyte.ops.library -> ops."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "demo_data" not in p.parts)


def at_run_time(tree: ast.AST, inside_functions: bool = True) -> list[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, which no running program executes.

    With inside_functions false, only what runs when the module is imported.
    """
    nodes, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif inside_functions or not isinstance(node, FUNCTIONS):
            nodes.append(node)
            waiting += ast.iter_child_nodes(node)
    return nodes


def imported(nodes: list[ast.AST], known: set[str]) -> set[str]:
    """Modules that import statements name; `from halfbyte import ops` names halfbyte.ops."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports inside the package are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inside or {node.module}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> modules of halfbyte that it imports anywhere at run time."""
    known = {module_name(path) for path in sources()} | {"halfbyte._core"}
    edges = {}
    for path in sources():
        found = imported(at_run_time(ast.parse(path.read_text())), known)
        edges[module_name(path)] = {name for name in found if name.split(".")[0] == "halfbyte"}
    return edges


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports that climb to a higher level."""
    return [
        f"{module} imports {name}, which stands above it"
        for module, names in sorted(graph.items())
        for name in sorted(names)
        if LEVEL[top(name)] < LEVEL[top(module)]
    ]


def test_every_module_has_a_level(graph):
    assert {top(module) for module in graph} - LEVEL.keys() == set()


def test_no_module_imports_upwards(graph):
    assert violations(graph) == []


def test_no_circles_between_folders(graph):
    tops: dict[str, set[str]] = {}
    for module, names in graph.items():
        tops.setdefault(top(module), set()).update({top(n) for n in names} - {top(module)})
    TopologicalSorter(tops).prepare()


def test_no_circles_between_files(graph):
    # A file may import its own package's front page only by way of the files behind it.
    files = {module: names - {module} for module, names in graph.items()}
    TopologicalSorter(files).prepare()


def test_the_check_finds_an_upward_import_and_a_circle():
    assert violations({"halfbyte.ops.gemm_4bit": {"halfbyte.linear"}}) == [
        "halfbyte.ops.gemm_4bit imports halfbyte.linear, which stands above it"
    ]
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def private_names(tree: ast.AST, known: set[str]) -> set[str]:
    """Names with an underscore that a file takes from modules of halfbyte."""
    nodes = at_run_time(tree)
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    origins = {
        a.asname or a.name: f"{node.module}.{a.name}" for node in imports for a in node.names
    }
    reads = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    of_modules = [(origins.get(n.value.id), n.attr) for n in reads]
    taken = {f"{module}.{name}" for module, name in of_modules if module in known}
    taken |= set(origins.values()) - known
    return {n for n in taken if re.fullmatch(r"halfbyte\b.*\._(?!_)[^.]+", n)}


def test_no_module_uses_what_another_keeps_to_itself():
    known = {module_name(path) for path in sources()} | {"halfbyte._core"}
    for path in sources():
        assert private_names(ast.parse(path.read_text()), known) == set(), path
    borrowed = "from halfbyte import linear\nfrom halfbyte.lora import _b_c\nlinear._a()"
    found = private_names(ast.parse(borrowed), known)
    assert found == {"halfbyte.linear._a", "halfbyte.lora._b_c"}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_other_libraries_are_imported_where_they_are_used(path):
    names = imported(at_run_time(ast.parse(path.read_text()), inside_functions=False), set())
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    allowed = IMPORTED_EAGERLY | BUILT_ON.get(module_name(path), set())
    assert packages - allowed == set()
