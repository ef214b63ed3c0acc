"""The rooms of the package, their order, and who imports whom. Needs nothing but Python."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "spikingbrain_train"

# A room imports from rooms on lower floors and from itself. Training measures held-out cross entropy while it
# runs, so evaluation lies below it; the exporter puts the files of hf into a checkpoint.
FLOORS = {
    "hf": 0,
    "storage": 0,
    "config": 1,
    "architecture": 2,
    "reporting": 2,
    "planning": 3,
    "runtime": 4,
    "ops": 5,
    "spiking": 5,
    "parallel": 6,
    "checkpoint": 7,
    "health": 7,
    "models": 7,
    "data": 7,
    "evaluation": 8,
    "training": 9,
    "conversion": 9,
    "layer_choice": 10,
    "spike_analysis": 9,
    "activation_sparsity": 9,
    "quantization": 10,
    "bricks": 10,
    "pipelines": 11,
    "commands": 12,
}


def files() -> list[Path]:
    """Every Python file of the package."""
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at any depth; relative ones made absolute.

    `from a.b import c` gives `a.b` unless `a/b/c` is a module or a room itself.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if module == PACKAGE or _file_of(whole) is not None else module


def room_of(module: str) -> str | None:
    """The room of one of our modules, None for a library and for the errors, which every room may raise."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] != "errors" else None


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {room: set() for room in FLOORS}
    for path in files():
        parts = path.relative_to(ROOT / PACKAGE).parts
        if len(parts) > 1:
            others = {room_of(module) for module in imported_modules(path)}
            found.setdefault(parts[0], set()).update(
                other for other in others if other not in (None, parts[0])
            )
    return found


def module_imports() -> dict[str, set[str]]:
    """The modules of ours that each module of ours imports, by dotted name."""
    ours = {_module_of(path): path for path in files()}
    return {name: set(imported_modules(path)) & ours.keys() - {name} for name, path in ours.items()}


def circle_in(graph: Mapping[str, set[str]]) -> list[str] | None:
    """The names along one circle of a graph, the first repeated at the end, or None where there is none."""
    done: set[str] = set()
    for start in sorted(graph):
        trail = [start]
        branches = [iter(sorted(graph[start]))]
        while branches and start not in done:
            following = next(branches[-1], None)
            if following is None:
                branches.pop()
                done.add(trail.pop())
            elif following in trail:
                return [*trail[trail.index(following) :], following]
            elif following not in done:
                trail.append(following)
                branches.append(iter(sorted(graph.get(following, ()))))
    return None


def _module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    if module.split(".")[0] != PACKAGE:
        return None
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
