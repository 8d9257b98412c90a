"""The imports of the project, read from its files: at their head, within functions, and for types alone."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import mbn
import mbn_numpy

ROOTS = {"mbn": Path(mbn.__file__).parent.parent, "backends": Path(mbn_numpy.__file__).parent.parent}


def modules() -> dict[str, Path]:
    """Return the files of mbn and its backends, by module name."""
    found = {}
    for path in ROOTS["mbn"].glob("mbn/**/*.py"):
        found[_name(path, ROOTS["mbn"])] = path
    for path in ROOTS["backends"].glob("mbn_*/**/*.py"):
        found[_name(path, ROOTS["backends"])] = path
    return {name: path for name, path in found.items() if not name.startswith("mbn_strict")}


def imports(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return for each module the others that it imports."""
    return {name: {other for other in _imported(path, files) if other != name} for name, path in files.items()}


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the sets of nodes that are on a common cycle."""
    reached = {node: _reached(node, graph) for node in graph}
    found = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return sorted(sorted(cycle) for cycle in found if cycle)


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in files or node.module in files:
                    yield name if name in files else str(node.module)


def _reached(start: str, graph: Mapping[str, Iterable[str]]) -> set[str]:
    """Return the nodes that can be reached from a node; it is among them if it is on a cycle."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph.get(node, ())
    return found
