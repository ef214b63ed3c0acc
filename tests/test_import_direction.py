"""Imports point downwards only:

a room from rooms on lower floors (scripts/rooms.py), and never in a circle.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.rooms import (
    FLOORS,
    PACKAGE,
    ROOT,
    arrows,
    circle_in,
    files,
    imported_modules,
    module_imports,
    room_of,
)

# Libraries that a room must do without, whichever file and function asks for them.
_TORCH = {"torch", "megatron", "transformers", "fla", "numpy"}
FORBIDDEN_LIBRARIES = {
    **dict.fromkeys(("storage", "reporting", "config", "architecture", "planning"), _TORCH),
    "ops": {"megatron", "transformers"},
    "hf": {"megatron", "fla", "omegaconf", "hydra"},
}
FILES = files()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_imports_point_downwards(path):
    relative = path.relative_to(ROOT / PACKAGE)
    room = relative.parts[0]
    if len(relative.parts) == 1:
        allowed = (None, "commands") if relative.name == "__main__.py" else (None, "runtime")
        assert all(room_of(module) in allowed for module in imported_modules(path))
        return
    assert room in FLOORS, f"{room} has no place in the order of rooms"
    for module in imported_modules(path):
        other = room_of(module)
        if other is None:
            assert module.split(".")[0] not in FORBIDDEN_LIBRARIES.get(room, set()), f"imports {module}"
        elif other != room:
            assert FLOORS[other] < FLOORS[room], f"imports {module}, which is not below {room}"


def test_every_room_has_a_floor_and_every_floor_its_room():
    assert {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")} == set(FLOORS)


def test_there_is_no_circle_of_rooms_or_modules():
    """Not even by an import inside a function."""
    assert circle_in(arrows()) is None
    assert circle_in(module_imports()) is None


def test_a_circle_is_found():
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"b", "e"}, "e": {"f"}, "f": {"d"}}
    assert circle_in(graph) == ["d", "e", "f", "d"]
    assert circle_in({**graph, "f": {"a"}}) is None


def test_imports_are_found_wherever_they_hide(monkeypatch):
    code = """
def f():
    from ..models import gpt_model
    from ..models.gpt_model import HybridGPTModel
    from spikingbrain_train import training
    import torch.nn
"""
    monkeypatch.setattr(Path, "read_text", lambda self: code)
    assert set(imported_modules(ROOT / PACKAGE / "ops" / "hidden.py")) == {
        "spikingbrain_train.models.gpt_model",
        "spikingbrain_train.training",
        "torch.nn",
    }
