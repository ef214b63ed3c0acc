"""What functions of GPU libraries take, read from their published sources.

Writes tests/gpu_libraries/signatures.json; run it after a line of
``spikingbrain_train/architecture/backends/releases.py`` changed. pip brings every release named there,
without its dependencies, into a folder that is deleted afterwards (some 60 MB). Nothing of it is compiled,
imported or installed, but pip runs the ``setup.py`` of a source archive to learn its name. The functions are
found as Python would find them, from the module that our adapter imports along the imports there, and parsed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spikingbrain_train.architecture.backends.fp8 import RECIPES, RECIPES_MODULE  # noqa: E402
from spikingbrain_train.architecture.backends.releases import RELEASES  # noqa: E402

RECORD = ROOT / "tests" / "gpu_libraries" / "signatures.json"

# What adapters call: a function or class of a module, or a method of its class. Behind a bar another name,
# which is called where the first one is not there.
FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "flash_attn": ("flash_attn:flash_attn_func", "flash_attn:flash_attn_varlen_func"),
    "fla": ("fla.ops.gla:chunk_gla", "fla.ops.gated_delta_rule:chunk_gated_delta_rule"),
    "mamba_ssm": ("mamba_ssm.ops.selective_scan_interface:selective_scan_fn",),
    "transformer_engine": (
        *(
            f"transformer_engine.pytorch:{name}.{method}"
            for name in ("Linear", "GroupedLinear")
            for method in ("__init__", "forward")
        ),
        "transformer_engine.pytorch:autocast|fp8_autocast",
        *(f"{RECIPES_MODULE}:{needs.recipe_class}" for needs in RECIPES.values()),
        *(
            f"transformer_engine.pytorch.permutation:moe_{name}"
            for name in (
                *("permute", "permute_with_probs", "unpermute"),
                *("sort_chunks_by_index", "sort_chunks_by_index_with_probs"),
            )
        ),
        "transformer_engine.pytorch.attention.rope:apply_rotary_pos_emb",
    ),
    "grouped_gemm": ("grouped_gemm.ops:gmm",),
}

# What later releases have.
NOT_IN_ALL = frozenset(f"{RECIPES_MODULE}:{needs.recipe_class}" for needs in RECIPES.values())

# What we set on objects of theirs, which each call has to read anew.
SWITCHES = ("fuse_wgrad_accumulation",)

# Source archives that would compile when pip asks for their name.
_NO_BUILD = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE"}


class Sources:
    """Python files of a package by their path in it: of a wheel, a source archive or an installed folder."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = dict(files)

    @classmethod
    def of(cls, path: Path, package: str) -> Sources:
        """What a wheel, a source archive or a folder with the package holds of it."""
        return cls(dict(_python_files(path, package)))

    def find(self, name: str) -> tuple[str, ast.FunctionDef]:
        """``package.module:function``, ``package.module:Class.method`` or ``package.module:Class``.

        Where there is no such module, what is in the one above it: releases before had it there.

        Returns:
            Its file and its definition, of a class that of its ``__init__`` without ``self``.

        Raises:
            LookupError: the module does not have it.
        """
        module, _, attribute = name.partition(":")
        wanted, _, method = attribute.partition(".")
        if not self._path(module):
            module = module.rpartition(".")[0]
        found = self._definition(module, wanted, set())
        if found is None:
            raise LookupError(f"{module} has no {wanted}")
        path, definition = found
        if method:
            methods = [
                each for each in getattr(definition, "body", []) if getattr(each, "name", "") == method
            ]
            if not methods:
                raise LookupError(f"{wanted} of {path} has no {method} of its own")
            definition = methods[-1]
        if isinstance(definition, ast.ClassDef):
            definition = _constructor(definition)
        if not isinstance(definition, ast.FunctionDef):
            raise LookupError(f"{name} is no function in {path}")
        return path, definition

    def _path(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((path for path in (f"{base}/__init__.py", f"{base}.py") if path in self._files), None)

    def _definition(self, module: str, name: str, seen: set[str]) -> tuple[str, ast.stmt] | None:
        """Where a module's name is defined: in its file, or along ``from`` imports of its package."""
        if f"{module}:{name}" in seen:
            return None
        seen.add(f"{module}:{name}")
        path = self._path(module)
        if path is None:
            return None
        tree = ast.parse(self._files[path], path)
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return path, node
        package = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        for statement in imports:  # in conditions, too
            above = package[: len(package) - statement.level + 1] if statement.level else []
            source = ".".join([*above, *([statement.module] if statement.module else [])])
            for alias in statement.names:
                if (alias.asname or alias.name) in (name, "*"):
                    original = name if alias.name == "*" else alias.name
                    if (found := self._definition(source, original, seen)) is not None:
                        return found
        return None


def _constructor(definition: ast.ClassDef) -> ast.FunctionDef:
    """What a class is called with: its ``__init__`` without ``self``, or the fields of a dataclass."""
    for each in definition.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            del each.args.args[0]
            return each
    fields = [each for each in definition.body if isinstance(each, ast.AnnAssign)]
    names = [
        ast.unparse(each.target) + (f"={ast.unparse(each.value)}" if each.value is not None else "")
        for each in fields
    ]
    made = ast.parse(f"def __init__({', '.join(names)}): ...").body[0]
    assert isinstance(made, ast.FunctionDef)
    return made


def _python_files(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """Path from the package on, and text."""
    if path.is_dir():
        for file in sorted((path / package).rglob("*.py")):
            yield file.relative_to(path).as_posix(), file.read_text(encoding="utf-8")
    elif path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if name.startswith(f"{package}/") and name.endswith(".py"):
                    yield name, wheel.read(name).decode()
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.partition("/")[2]  # below the folder of the release
                source = archive.extractfile(member) if name.endswith(".py") else None
                if source is not None and name.startswith(f"{package}/"):
                    yield name, source.read().decode()


def parameters(definition: ast.FunctionDef) -> str:
    """Its parameters without annotations: ``q, k, v, dropout_p=0.0, *, causal=False``."""
    arguments = definition.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*every, *filter(None, (arguments.vararg, arguments.kwarg))]:
        argument.annotation = None
    return ast.unparse(arguments)


def switches_in(definition: ast.FunctionDef) -> list[str]:
    """Those of ``SWITCHES`` that a method reads of its object."""
    read = {ast.unparse(node) for node in ast.walk(definition) if isinstance(node, ast.Attribute)}
    return [name for name in SWITCHES if f"self.{name}" in read]


def signature(text: str) -> inspect.Signature:
    """What :func:`parameters` wrote, to bind calls to. Defaults are left as ``...``."""
    arguments = ast.parse(f"def function({text}): ...").body[0].args  # type: ignore[attr-defined]
    kinds = inspect.Parameter
    plain: list[tuple[str, Any]] = [(each.arg, kinds.POSITIONAL_ONLY) for each in arguments.posonlyargs]
    plain += [(each.arg, kinds.POSITIONAL_OR_KEYWORD) for each in arguments.args]
    required = len(plain) - len(arguments.defaults)
    found = [
        kinds(name, kind, default=kinds.empty if number < required else ...)
        for number, (name, kind) in enumerate(plain)
    ]
    if arguments.vararg is not None:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(each.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else ...))
    if arguments.kwarg is not None:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def download(source: str, folder: Path) -> Path:
    """The wheel, archive or unpacked archive that pip takes for ``distribution==version``.

    Raises:
        SystemExit: pip could not get it, with what it said.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-clean", "--dest", str(folder / "archives"), source],
        env=os.environ | _NO_BUILD | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        (archive,) = (folder / "archives").iterdir()
        return archive
    # pip has an archive but does not keep it where its setup.py ends without a GPU (grouped_gemm's).
    unpacked = [setup.parent for setup in folder.glob("pip-download-*/*/setup.py")]
    if len(unpacked) != 1:
        raise SystemExit(f"pip has not got {source}:\n{done.stderr}")
    return unpacked[0]


def read_release(source: str, package: str) -> dict[str, dict[str, str] | None]:
    """Function -> its file, parameters and (of ``forward``) switches in a published release."""
    with tempfile.TemporaryDirectory() as folder:
        return record_of(Sources.of(download(source, Path(folder)), package), package)


def record_of(sources: Sources, package: str) -> dict[str, dict[str, str] | None]:
    """As :func:`read_release`; None where a release does not have it that has others like it."""
    found: dict[str, dict[str, str] | None] = {}
    for name in FUNCTIONS[package]:
        module, _, attributes = name.partition(":")
        found[name] = None
        for attribute in attributes.split("|"):
            try:
                path, definition = sources.find(f"{module}:{attribute}")
            except LookupError:
                if name not in NOT_IN_ALL and attribute == attributes.split("|")[-1]:
                    raise
                continue
            entry = {"file": path, "parameters": parameters(definition)}
            if "|" in attributes:
                entry = {"name": attribute, **entry}
            if name.endswith(".forward"):
                entry["reads"] = ", ".join(switches_in(definition))
            found[name] = entry
            break
    return found


def main() -> None:
    """Write the record, or compare it with what is published now."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs")
    arguments = parser.parse_args()
    found = {}
    for package, releases in RELEASES.items():
        for source in releases.sources:
            print(source, file=sys.stderr, flush=True)
            found[source] = read_release(source, package)
    text = json.dumps(found, indent=1) + "\n"
    if arguments.check:
        if RECORD.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{RECORD.relative_to(ROOT)} differs: run {Path(__file__).name} without --check")
        return
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
