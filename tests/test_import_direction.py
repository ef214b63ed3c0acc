"""Imports point downwards only:

training, conversion -> evaluation -> models, data, checkpoint -> parallel -> ops -> runtime -> planning ->
architecture -> config -> storage; hf alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "spikingbrain_train"
ROOT = Path(__file__).resolve().parents[1]

# A room imports from rooms on lower floors and from itself. Training measures held-out cross entropy while it
# runs, so evaluation lies below it; the exporter puts the files of hf into a checkpoint.
FLOORS = {
    "hf": 0,
    "storage": 0,
    "reporting": 0,
    "config": 1,
    "architecture": 2,
    "planning": 3,
    "runtime": 4,
    "ops": 5,
    "spiking": 5,
    "parallel": 6,
    "checkpoint": 7,
    "models": 7,
    "data": 7,
    "evaluation": 8,
    "training": 9,
    "conversion": 9,
    "pipelines": 10,
}
# Libraries that a room must do without, whichever file and function asks for them.
_TORCH = {"torch", "megatron", "transformers", "fla", "numpy"}
FORBIDDEN_LIBRARIES = {
    **dict.fromkeys(("storage", "reporting", "config", "architecture", "planning"), _TORCH),
    "ops": {"megatron", "transformers"},
    "hf": {"megatron", "fla", "omegaconf", "hydra"},
}
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at any depth; relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from spikingbrain_train import ops` imports the room ops.
            yield from ([f"{module}.{alias.name}" for alias in node.names] if module == PACKAGE else [module])


def room_of(module: str) -> str | None:
    """The room of one of our modules, None for a library and for the errors, which every room may raise."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] != "errors" else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_imports_point_downwards(path):
    relative = path.relative_to(ROOT / PACKAGE)
    room = relative.parts[0]
    if len(relative.parts) == 1:
        assert all(room_of(module) in (None, "runtime") for module in imported_modules(path))
        return
    assert room in FLOORS, f"{room} has no place in the order of rooms"
    for module in imported_modules(path):
        other = room_of(module)
        if other is None:
            assert module.split(".")[0] not in FORBIDDEN_LIBRARIES.get(room, set()), f"imports {module}"
        elif other != room:
            assert FLOORS[other] < FLOORS[room], f"imports {module}, which is not below {room}"


def test_the_rooms_of_the_design_are_all_known():
    rooms = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert rooms <= set(FLOORS)


def test_imports_are_found_wherever_they_hide(monkeypatch):
    code = """
def f():
    from ..models import gpt_model
    from spikingbrain_train import training
    import torch.nn
"""
    monkeypatch.setattr(Path, "read_text", lambda self: code)
    assert set(imported_modules(ROOT / PACKAGE / "ops" / "hidden.py")) == {
        "spikingbrain_train.models",
        "spikingbrain_train.training",
        "torch.nn",
    }
