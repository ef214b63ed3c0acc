"""The code that an export in this project's own format carries: shared files, and one of each kind.

A kind names its file (:attr:`~spikingbrain_train.architecture.kind.Kind.export_module`), one of
:mod:`spikingbrain_train.hf` or of a plugin. transformers copies the files that a folder's modelling file
imports, releases before 5 none that only those import. So that file names all of them: what lies in the
package imports the package's own kinds, and an export's those of its model.

transformers 5 takes the first model class that it has seen for a configuration class, and the code of two
folders of one name gives one configuration class where its file is the same. So that file ends with a digest
of the others.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from spikingbrain_train.architecture.kind import Kind
from spikingbrain_train.config.import_path import find_in_current_folder, reason_of
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.hf import Code

_ALLOWED = frozenset({"torch", "transformers", *sys.stdlib_module_names})
"""What files of an export may import beside each other: a folder is to load wherever these are."""
_FILE = re.compile(r"[A-Za-z_]\w*")


def code_of_export(code: Code, kinds: Iterable[Kind] = ()) -> dict[str, str]:
    """Every file of an export by its name.

    Args:
        code: of the format; its modelling file imports those of the package's kinds.
        kinds: that the model is made of and that the format adds files for. Those without a file of their own
            are in the shared ones.

    Raises:
        ConfigurationError: the file of a kind is not there, is no Python, has a name that is taken, or
            imports what an export does not carry.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in code.files}
    package, own = code.files[0].parent, dict(texts)
    for kind in kinds:
        if kind.export_module is not None:
            _add(texts, own, _file_of(kind), kind)
    added = [name for name in texts if name not in own]
    modelling = next(name for name in own if name.startswith("modeling"))
    kinds_of_package = {path.name for path in package.glob("*.py")} - set(own)
    texts[modelling] = _importing(texts[modelling], kinds_of_package, added)
    configuration = code.auto_map["AutoConfig"].split(".")[0] + ".py"
    texts[configuration] += f"\n# Digest of all code of this folder: {_digest(texts)}\n"
    return texts


def from_outside(kinds: Iterable[Kind]) -> list[str]:
    """Names of those whose file lies outside this package."""
    root = __name__.partition(".")[0]
    return [kind.name for kind in kinds if kind.export_module and kind.export_module.split(".")[0] != root]


def _digest(texts: dict[str, str]) -> str:
    named = "".join(f"{name}\n{hashlib.sha256(texts[name].encode()).hexdigest()}\n" for name in sorted(texts))
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _file_of(kind: Kind) -> Path:
    assert kind.export_module is not None
    find_in_current_folder()
    try:
        spec = importlib.util.find_spec(kind.export_module)
    except Exception as error:  # packages around it are imported, and raise whatever they like
        raise _wrong(kind, f"which cannot be found: {reason_of(error)}") from error
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise _wrong(kind, "which is no Python file; write package.module, with its folder on PYTHONPATH")
    return Path(spec.origin)


def _add(texts: dict[str, str], own: dict[str, str], path: Path, kind: Kind) -> None:
    """Add a file and those beside it that it imports."""
    text = path.read_text(encoding="utf-8")
    if path.name in own or texts.get(path.name, text) != text:
        raise _wrong(kind, f"but an export has another {path.name}; rename it")
    if path.name in texts:
        return
    texts[path.name] = text
    try:
        tree = ast.parse(text, str(path))
    except SyntaxError as error:
        raise _wrong(kind, f"which is no Python: {path}: {error.msg}, line {error.lineno}") from error
    for level, module, line in _imports(tree):
        where = f"whose {path.name} imports {'.' * level}{module} in line {line}"
        if level == 0:
            if module.split(".")[0] not in _ALLOWED:
                raise _wrong(
                    kind,
                    f"{where}: outside of try, a file of an export imports nothing but torch, transformers, "
                    f"Python's own modules and files beside it (from .file import name)",
                )
        elif level > 1 or not _FILE.fullmatch(module):
            raise _wrong(kind, f"{where}; write from .file import name, of a file beside it")
        elif f"{module}.py" not in own:
            beside = path.parent / f"{module}.py"
            if not beside.is_file():
                raise _wrong(kind, f"{where}, which is neither beside it nor a file of every export")
            _add(texts, own, beside, kind)


def _imports(node: ast.AST) -> Iterator[tuple[int, str, int]]:
    """Level, module and line of every import but those in a ``try``, which may fail."""
    if isinstance(node, ast.Try):
        return
    if isinstance(node, ast.ImportFrom):
        yield node.level, node.module or "", node.lineno
    elif isinstance(node, ast.Import):
        yield from ((0, alias.name, node.lineno) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


def _wrong(kind: Kind, why: str) -> ConfigurationError:
    return ConfigurationError(f"{kind.name} has export_module={kind.export_module}, {why}")


def _importing(text: str, kinds_of_package: set[str], added: list[str]) -> str:
    """A modelling file that imports ``added`` in the place of all kinds of the package."""
    lines, places = [], []
    for line in text.splitlines(keepends=True):
        found = re.match(r"from \.(\w+) import", line)
        if found is None or f"{found[1]}.py" not in kinds_of_package:
            lines.append(line)
            continue
        places.append(len(lines))
        if f"{found[1]}.py" in added:
            lines.append(line)
    named = set(re.findall(r"^from \.(\w+) import", "".join(lines), re.MULTILINE))
    stems = [Path(name).stem for name in added]
    more = [f"from .{stem} import __name__ as _{stem}  # noqa: F401\n" for stem in stems if stem not in named]
    end = places[-1] if places else len(lines)
    return "".join([*lines[:end], *more, *lines[end:]])
