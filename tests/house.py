"""The imports of the project, as its files say them: at their head, within functions, and for types alone."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import mbn
import mbn_numpy

ROOTS = {"mbn": Path(mbn.__file__).parent.parent, "backends": Path(mbn_numpy.__file__).parent.parent}


def modules() -> dict[str, Path]:
    """Return the files of mbn and of its backends by the names of their modules."""
    found = {}
    for path in ROOTS["mbn"].glob("mbn/**/*.py"):
        found[_name(path, ROOTS["mbn"])] = path
    for path in ROOTS["backends"].glob("mbn_*/**/*.py"):
        found[_name(path, ROOTS["backends"])] = path
    return {name: path for name, path in found.items() if not name.startswith("mbn_strict")}


def imports(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return for each module the others that it imports."""
    return {name: {other for other in _imported(path, files) if other != name} for name, path in files.items()}


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the sets of nodes that lead to each other."""
    reached = {node: _reached(node, graph) for node in graph}
    found = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return sorted(sorted(circle) for circle in found if circle)


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
    """Return the nodes that paths from one lead to; itself if it is on a circle."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph.get(node, ())
    return found
