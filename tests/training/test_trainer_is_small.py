"""The trainer knows steps and hooks. What hangs on them is in files of its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TRAINING = Path(__file__).resolve().parents[2] / "spikingbrain_train" / "training"
SOURCE = (TRAINING / "trainer.py").read_text()
(TRAINER,) = (
    node for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef) and node.name == "Trainer"
)
METHODS = {node.name: node for node in TRAINER.body if isinstance(node, ast.FunctionDef)}


def lines_of(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_the_class_is_small_and_its_loop_fits_on_a_screen() -> None:
    assert lines_of(TRAINER) <= 200
    assert lines_of(METHODS["train"]) + lines_of(METHODS["_step"]) <= 50


@pytest.mark.parametrize("word", ["expert", "spik", "sink", "moe", "wandb", "tensorboard", "perplexity"])
def test_it_has_no_word_of_what_hangs_on_hooks(word: str) -> None:
    text = re.sub("spikingbrain", "", SOURCE, flags=re.IGNORECASE)  # the project's name
    assert not re.search(word, text, re.IGNORECASE)


def test_no_module_of_training_asks_which_kind_a_stage_is() -> None:
    """A kind says what it is (planning/stages); the registry is asked by name, and nothing is compared."""
    package = TRAINING.parent
    own = {package / "planning" / "stages", TRAINING / "stages"}
    for path in package.rglob("*.py"):
        if own & set(path.parents):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "stage.kind" not in text, f"{path}:{node.lineno} compares {text}"
            if isinstance(node, ast.Constant) and node.value in ("align", "cpt", "distill"):
                earlier = package / "config" / "earlier_releases.py"
                assert path in (package / "config" / "stage.py", earlier) or "pipelines" in path.parts, (
                    f"{path}:{node.lineno} names the stage {node.value}"
                )
