"""The strings below fields of dataclasses and members of enums, read from their source.

Python keeps none of them, and help that repeated them would soon say something else.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from enum import Enum
from functools import cache
from pathlib import Path


def docstring_of(owner: type) -> str:
    """What stands below ``class ...``, a line a paragraph; empty where nothing does."""
    written = vars(owner).get("__doc__") or ""
    # Python writes one itself for dataclasses and, until 3.12, for enums.
    is_pythons = written == Enum.__doc__ or written.startswith(f"{owner.__name__}(")
    return "" if is_pythons else paragraphs(written)


def field_docstrings(schema: type) -> dict[str, str]:
    """What stands below every field of a dataclass, those of the classes it extends included."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        found |= _below_assignments(owner)
    return found


def member_docstrings(choices: type[Enum]) -> dict[str, str]:
    """What stands below every member of an enum, by its name; empty where nothing does."""
    said = _below_assignments(choices)
    return {member.name: said.get(member.name, "") for member in choices}


def paragraphs(text: str) -> str:
    """A docstring with every paragraph in one line, blank lines between them."""
    blocks = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(block.split()) for block in blocks if block.strip())


_SENTENCE = re.compile(r"(.*?)(?<!\be\.g)(?<!\bi\.e)(?<!\beq)\.(?= [A-Z\d\"'`(\[]|$)")


def summary(text: str) -> str:
    """The first sentence of a docstring, without its full stop."""
    first = text.split("\n\n")[0]
    sentence = _SENTENCE.match(first)
    return sentence[1] if sentence else first


@cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    """The classes at the top of a module, by name; none where its source is not there."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not file.endswith(".py"):
        return {}
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def _below_assignments(owner: type) -> dict[str, str]:
    node = _classes_of(owner.__module__).get(owner.__qualname__)
    if node is None:
        return {}
    found: dict[str, str] = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        text = following.value if isinstance(following, ast.Expr) else None
        if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
            continue
        targets: list[ast.expr] = []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        elif isinstance(statement, ast.Assign):
            targets = statement.targets
        found |= {target.id: paragraphs(text.value) for target in targets if isinstance(target, ast.Name)}
    return found
