"""The four packages know only those below them, and no module needs one that needs it: read from the imports.

Imports within functions count, and those for types alone: what a reader must know, he must know there too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FROM_THE_TOP = ("server", "engine", "memory", "quant")


def _module_files() -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    files: dict[str, Path] = {}
    for room in FROM_THE_TOP:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def _imported(module: str, tree: ast.Module, known: frozenset[str]) -> Iterator[str]:
    """The modules among `known` that `module` imports, wherever in the file it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known:
                    yield node.module


def imports_of(files: dict[str, Path]) -> dict[str, set[str]]:
    """Which modules each module imports, of these modules."""
    known = frozenset(files)
    return {name: set(_imported(name, ast.parse(path.read_text()), known)) for name, path in files.items()}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, its first module again at its end; nothing where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle[::-1]
    return []


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a package above the importing one, as "module imports module"."""
    floor = {room: number for number, room in enumerate(FROM_THE_TOP)}
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if floor[other.partition(".")[0]] < floor[module.partition(".")[0]]
    ]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return imports_of(_module_files())


def test_no_module_imports_one_that_needs_it(graph: dict[str, set[str]]) -> None:
    circle = circle_in(graph)
    assert not circle, f"a circle: {' imports '.join(circle)}; what they share belongs in a third module"


def test_imports_go_down_only(graph: dict[str, set[str]]) -> None:
    assert upward_imports(graph) == []


def test_each_package_is_seen_to_use_the_next(graph: dict[str, set[str]]) -> None:
    uses = {
        (name.partition(".")[0], other.partition(".")[0])
        for name, others in graph.items()
        for other in others
    }
    assert set(pairwise(FROM_THE_TOP)) <= uses


@pytest.mark.parametrize(
    "statement",
    [
        "import memory.b",
        "from memory import b",
        "from memory.b import name",
        "def f():\n    from memory.b import name",
    ],
)
def test_a_circle_is_found_however_it_is_written(statement: str, tmp_path: Path) -> None:
    files = {"memory.a": tmp_path / "a.py", "memory.b": tmp_path / "b.py", "memory": tmp_path / "__init__.py"}
    files["memory"].write_text("")
    files["memory.a"].write_text(statement)
    files["memory.b"].write_text("if TYPE_CHECKING:\n    from memory.a import name")
    assert circle_in(imports_of(files)) in (
        ["memory.a", "memory.b", "memory.a"],
        ["memory.b", "memory.a", "memory.b"],
    )


def test_an_import_from_above_is_found(tmp_path: Path) -> None:
    files = {"engine.a": tmp_path / "a.py", "memory.b": tmp_path / "b.py"}
    files["engine.a"].write_text("")
    files["memory.b"].write_text("if TYPE_CHECKING:\n    from engine.a import name")
    assert upward_imports(imports_of(files)) == ["memory.b imports engine.a"]
