"""Every patch of torch and megatron-core is an entry of one registry, which says where it is in force.

The log and docs/patches.md say the same. No other room assigns to a name of either library.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from spikingbrain_train.config.parallel import AcceleratorKind
from spikingbrain_train.runtime import megatron_cpu, patches
from spikingbrain_train.runtime.accelerator import Accelerator
from spikingbrain_train.runtime.patch import ON_CPU, Moment, Patch

ROOT = Path(__file__).resolve().parents[2]
KINDS = [AcceleratorKind.cpu, AcceleratorKind.cuda, AcceleratorKind.metax]
CPU_ONLY = {patch.name for patch in megatron_cpu.PATCHES}


def machine(kind: AcceleratorKind) -> Accelerator:
    return Accelerator(kind, "a device", 0 if kind is AcceleratorKind.cpu else 1, {})


def test_every_patch_says_what_it_changes_and_why() -> None:
    names = [patch.name for patch in patches.PATCHES]
    assert len(set(names)) == len(names) > 10
    assert all(len(patch.changes) > 20 and len(patch.reason) > 20 for patch in patches.PATCHES)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_due_on_a_platform_is_applied_once_and_reported_every_time(
    monkeypatch: pytest.MonkeyPatch, kind: AcceleratorKind
) -> None:
    made: list[str] = []

    def probe(name: str, **where: object) -> Patch:
        return Patch(name, "nothing", "to see", lambda: made.append(name), **where)  # type: ignore[arg-type]

    everywhere = probe("everywhere")
    others = [
        probe("on CPU", platforms=ON_CPU),
        probe("of another version", versions="megatron-core<0.16"),
        probe("of this version", versions="megatron-core>=0.16"),
        probe("before", moment=Moment.importing),
        probe("later", moment=Moment.using),
    ]
    monkeypatch.setattr(patches, "PATCHES", (everywhere, *others))
    monkeypatch.setattr(patches, "_applied", [])
    expected = ["everywhere", *(["on CPU"] if kind is AcceleratorKind.cpu else []), "of this version"]
    for _ in range(2):
        assert patches.apply(machine(kind)) == tuple(expected)
    assert made == expected
    line = patches.describe(machine(kind))
    assert line.endswith(": " + ", ".join([*expected, "before"]) + "; around single calls: later")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("megatron_core", "writes_in_forks"), [("0.16.1", True), ("0.19.2", False)])
def test_each_platform_and_version_gets_its_own(
    monkeypatch: pytest.MonkeyPatch, kind: AcceleratorKind, megatron_core: str, writes_in_forks: bool
) -> None:
    installed = {"torch": "2.6.0+cu124", "megatron-core": megatron_core}
    monkeypatch.setattr(patches, "installed_versions", lambda: installed)
    names = {patch.name for patch in patches.due(kind)}
    assert CPU_ONLY & names == (CPU_ONLY if kind is AcceleratorKind.cpu else set())
    assert ("shards_in_threads" in names) is writes_in_forks
    assert ("no_removal_notices" in names) is not writes_in_forks
    assert {"no_cuda_notice", "writers_report_in_process", "keep_step_when_loading"} <= names
    line = patches.describe(machine(kind))
    assert f"patches of torch 2.6.0+cu124 and megatron-core {megatron_core} on {kind.value}: no_cuda" in line
    assert "\n" not in line and all(name in line for name in names)


def test_the_docs_list_the_registry() -> None:
    page = (ROOT / "docs" / "patches.md").read_text()
    assert patches.table() in page, "replace its table by: python -m spikingbrain_train.runtime.patches"


FILES = [
    path
    for path in sorted((ROOT / "spikingbrain_train").rglob("*.py"))
    if path.relative_to(ROOT / "spikingbrain_train").parts[0] != "runtime"
]


def _patched(tree: ast.AST) -> Iterator[str]:
    """Assignments to attributes of torch and megatron-core, and of functions to attributes of anything that
    is not the object's own. What torch.backends holds is a setting, which torch documents to be assigned."""
    theirs, functions = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            theirs |= {(a.asname or a.name).split(".")[0] for a in node.names if _is_theirs(a.name)}
        elif isinstance(node, ast.ImportFrom) and _is_theirs(node.module or ""):
            theirs |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            functions.add(node.name)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
        for target in targets:
            if isinstance(target, ast.Attribute):
                owner = target.value
                while isinstance(owner, ast.Attribute):
                    owner = owner.value
                name = owner.id if isinstance(owner, ast.Name) else ""
                value = getattr(node, "value", None)
                function = isinstance(value, ast.Lambda) or (
                    isinstance(value, ast.Name) and value.id in functions
                )
                if ast.unparse(target).startswith("torch.backends."):
                    continue
                if name in theirs or (function and name != "self"):
                    yield ast.unparse(node)
        sets = isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"
        if sets and ast.unparse(node.args[0]).split(".")[0] in theirs:  # type: ignore[attr-defined]
            yield ast.unparse(node)


def _is_theirs(module: str) -> bool:
    return module.split(".")[0] in ("torch", "megatron")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_room_patches_torch_or_megatron(path: Path) -> None:
    assert list(_patched(ast.parse(path.read_text()))) == []


def test_patches_are_found_however_they_are_written() -> None:
    code = """
import torch
from megatron.core.transformer import mlp
def f(): ...
torch.distributed.all_reduce = g
mlp.MLP.forward = g
optimizer.step = f
optimizer.step = lambda: None
setattr(mlp.MLP, "forward", g)
del torch.Tensor.type
self.step = f
config.bf16 = True
"""
    assert len(list(_patched(ast.parse(code)))) == 6
