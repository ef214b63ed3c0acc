"""Our calls of GPU libraries, bound to what their functions take in every release that was looked at.

``signatures.json`` was read from the published sources (scripts/record_signatures.py). Our calls are the real
ones: the adapters run with a function in the library's place that keeps its arguments. Transformer Engine
and grouped_gemm are called by megatron-core's classes, whose calls are read from its source.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from scripts.record_signatures import (
    FUNCTIONS,
    NOT_IN_ALL,
    RECORD,
    Sources,
    parameters,
    record_of,
    signature,
)
from spikingbrain_train.architecture.backends.fp8 import RECIPES, RECIPES_MODULE
from spikingbrain_train.architecture.backends.releases import RELEASES, Releases, untested
from spikingbrain_train.architecture.backends.tables import TABLES
from spikingbrain_train.config.fp8 import Fp8Format, Fp8Recipe
from spikingbrain_train.hf import gdn_spikingbrain, ops_gla_swa
from spikingbrain_train.ops.gated_delta_rule.flash_linear_attention import fla_gated_delta_rule
from spikingbrain_train.ops.gated_linear_attention.flash_linear_attention import fla_gated_linear_attention
from spikingbrain_train.ops.selective_scan.mamba_ssm import mamba_ssm_selective_scan
from spikingbrain_train.ops.softmax_attention.documents import Documents
from spikingbrain_train.ops.softmax_attention.flash import flash_attn_softmax_attention
from spikingbrain_train.runtime.fp8 import fp8_autocast
from spikingbrain_train.runtime.megatron_versions import HAS_GROUPED_MLP

RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
SOURCES = [(source, package) for package, releases in RELEASES.items() for source in releases.sources]

AUTOCAST = "transformer_engine.pytorch:autocast|fp8_autocast"

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments and those by name."""


def test_every_release_and_function_is_recorded() -> None:
    assert list(RECORDED) == [source for source, _ in SOURCES], "run scripts/record_signatures.py"
    assert all(tuple(RECORDED[source]) == FUNCTIONS[package] for source, package in SOURCES)


def test_every_library_that_a_backend_calls_has_releases() -> None:
    called = {backend.package for table in TABLES.values() for backend in table if backend.package}
    # Of Triton torch's own flex attention makes the calls; Apex is published nowhere, and its kernel is C++.
    assert called - {"triton", "apex"} == set(RELEASES)


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed")
def test_installed_release_reads_as_it_was_recorded() -> None:
    package = importlib.util.find_spec("fla")
    assert package is not None and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]).parent
    version = importlib.metadata.version("fla-core")
    if f"fla-core=={version}" not in RECORDED:
        pytest.skip(f"fla-core {version} is installed, which is none of the recorded ones")
    assert record_of(Sources.of(folder, "fla"), "fla") == RECORDED[f"fla-core=={version}"]


def function(a: int, b: float = 1.0, *rest: int, c: int, d: str = "x", **more: int) -> None:
    """Has every kind of parameter."""


@dataclass
class Recorded:
    """Has fields, of which some are no parameters."""

    a: int = 1
    b = 2
    c: str = "x"

    def method(self) -> None:
        """No parameter either."""


def test_a_class_is_called_with_its_fields_or_what_it_says_itself(tmp_path: Path) -> None:
    package = tmp_path / "library"
    package.mkdir()
    text = inspect.getsource(Recorded) + "\nclass Own:\n    def __init__(self, d, e=1): ...\n"
    package.joinpath("__init__.py").write_text(text)
    for name, expected in (("Recorded", ["a", "c"]), ("Own", ["d", "e"])):
        _, definition = Sources.of(tmp_path, "library").find(f"library:{name}")
        assert list(signature(parameters(definition)).parameters) == expected


def test_a_signature_is_read_as_python_has_it(tmp_path: Path) -> None:
    package = tmp_path / "library"
    package.mkdir()
    package.joinpath("__init__.py").write_text("if True:\n    from .inner import function as renamed\n")
    package.joinpath("inner.py").write_text(inspect.getsource(function))
    path, definition = Sources.of(tmp_path, "library").find("library:renamed")
    assert path == "library/inner.py"
    found, real = signature(parameters(definition)), inspect.signature(function)
    assert [(each.name, each.kind) for each in found.parameters.values()] == [
        (each.name, each.kind) for each in real.parameters.values()
    ]
    found.bind(1, c=2)
    for args, kwargs in (((), {"c": 2}), ((1,), {})):
        with pytest.raises(TypeError):
            found.bind(*args, **kwargs)
    with pytest.raises(LookupError, match="library has no missing"):
        Sources.of(tmp_path, "library").find("library:missing")


class Kept:
    """Stands in a library's place and keeps what it is called with."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.calls: list[Call] = []
        self._answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self._answer(*args, **kwargs)


def put(name: str, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``package.module:function`` can be imported; its parents need not be there."""
    module, _, attribute = name.partition(":")
    stand_in = sys.modules.get(module) if getattr(sys.modules.get(module), "is_stand_in", False) else None
    if stand_in is None:
        stand_in = ModuleType(module)
        stand_in.is_stand_in = True  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module, stand_in)
    setattr(stand_in, attribute, function)


def recurrence(q: Tensor, k: Tensor, v: Tensor, *_: Any, cu_seqlens: Any = None, **__: Any) -> Any:
    documents = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return v, q.new_zeros(documents, q.shape[2], q.shape[3], v.shape[3])


def calls_of_adapters(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Call]]:
    """Every way in which our adapters call each function."""
    gla, delta = Kept(recurrence), Kept(recurrence)
    flash, varlen = Kept(lambda q, *_, **__: q), Kept(lambda q, *_, **__: q)
    scan = Kept(lambda u, delta, A, *_, **__: (u, u.new_zeros(u.shape[0], *A.shape)))
    names = {
        "fla.ops.gla:chunk_gla": gla,
        "fla.ops.gated_delta_rule:chunk_gated_delta_rule": delta,
        "flash_attn:flash_attn_func": flash,
        "flash_attn:flash_attn_varlen_func": varlen,
        "mamba_ssm.ops.selective_scan_interface:selective_scan_fn": scan,
    }
    for name, kept in names.items():
        put(name, kept, monkeypatch)
    B, T, H, G, D = 1, 6, 4, 2, 8
    q, k, v = (torch.randn(B, T, heads, D) for heads in (H, G, G))
    gate, gate_a_head, beta = -torch.rand(B, T, G, D), -torch.rand(B, T, G), torch.rand(B, T, G)
    state = torch.zeros(B, G, D, D)
    starts = torch.tensor([[True, False, True, False, False, False]])
    for initial, bounds in ((None, None), (state, None), (state.repeat(2, 1, 1, 1), (0, 2, T))):
        options: dict[str, Any] = {"scale": 1.0, "output_final_state": True, "cu_seqlens": bounds}
        fla_gated_linear_attention(q, k, v, gate, initial, **options)
        fla_gated_delta_rule(q, k, v, gate_a_head, beta, initial, **options)
    kernel = sys.modules["fla.ops.gla"].chunk_gla
    for documents in (None, starts):
        ops_gla_swa.gated_linear_attention_by_kernel(kernel, q, k, v, gate, None, documents)
    delta_kernel = sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule
    gdn_spikingbrain._by_kernel(delta_kernel, (q, k, v, gate_a_head, beta), state)
    for window in (None, 2):
        for documents in (None, Documents((0, 2, T), (0, 2, T))):
            for strict in (False, True):
                name = "are_deterministic_algorithms_enabled"
                monkeypatch.setattr(torch, name, lambda strict=strict: strict)
                flash_attn_softmax_attention(q, k, v, window=window, scale=1.0, documents=documents)
    x, A, B_and_C = torch.randn(1, T, D), -torch.rand(D, 3), torch.randn(1, T, 3)
    mamba_ssm_selective_scan(x, x, A, B_and_C, B_and_C)
    return {name: kept.calls for name, kept in names.items()}


@pytest.fixture(scope="module")
def our_calls() -> dict[str, list[Call]]:
    """Of adapters and of megatron-core, by function."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = calls_of_adapters(monkeypatch)
    calls["grouped_gemm.ops:gmm"] = calls_in("transformer/moe/experts.py", None, ("gg.ops.gmm",))
    for ours, theirs in (("TELinear", "Linear"), ("TEGroupedLinear", "GroupedLinear")):
        for method in ("__init__", "forward"):
            made = calls_in("extensions/transformer_engine.py", ours, (f"super().{method}",))
            # The object itself comes first in what was recorded.
            name = f"transformer_engine.pytorch:{theirs}.{method}"
            calls[name] = [((None, *args), kwargs) for args, kwargs in made]
    for name in FUNCTIONS["transformer_engine"]:
        if ".permutation:moe_" in name:
            theirs = name.replace("transformer_engine.pytorch.permutation:moe_", "fused_")
            calls[name] = calls_in("transformer/moe/moe_utils.py", None, (theirs,))
    turn = "transformer_engine.pytorch.attention.rope:apply_rotary_pos_emb"
    calls[turn] = calls_in("extensions/transformer_engine.py", None, ("apply_rotary_pos_emb",))
    return calls


def calls_in(file: str, class_name: str | None, functions: tuple[str, ...]) -> list[Call]:
    """Calls of functions, as written in a class of megatron-core; ``**kwargs`` are left out."""
    package = importlib.util.find_spec("megatron.core")
    assert package is not None and package.submodule_search_locations
    tree: ast.AST = ast.parse((Path(package.submodule_search_locations[0]) / file).read_text())
    if class_name is not None:
        (tree,) = (
            node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == class_name
        )
    return [
        (tuple(node.args), {each.arg: each.value for each in node.keywords if each.arg is not None})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in functions
    ]


@pytest.mark.parametrize(("source", "package"), SOURCES)
def test_our_calls_fit_every_release(source: str, package: str, our_calls: dict[str, list[Call]]) -> None:
    if package == "grouped_gemm" and not HAS_GROUPED_MLP:
        pytest.skip("this megatron-core does not call grouped_gemm")
    for name, recorded in RECORDED[source].items():
        if name == AUTOCAST or name in NOT_IN_ALL:
            continue  # see test_fp8_is_asked_for_as_every_release_takes_it
        assert our_calls[name], f"nothing of ours calls {name}"
        taken = signature(recorded["parameters"])
        for args, kwargs in our_calls[name]:
            if name.endswith(":apply_rotary_pos_emb") and "interleaved" not in taken.parameters:
                # megatron-core says it to Transformer Engine from 2.3 on.
                kwargs = {key: value for key, value in kwargs.items() if key != "interleaved"}
            taken.bind(*args, **kwargs)


def test_transformer_engines_linears_read_in_every_call_who_adds_weight_gradients() -> None:
    read = {
        (source, name): recorded["reads"]
        for source, functions in RECORDED.items()
        for name, recorded in functions.items()
        if recorded is not None and "reads" in recorded
    }
    assert len(read) == 2 * len(RELEASES["transformer_engine"].sources)
    assert set(read.values()) == {"fuse_wgrad_accumulation"}


@pytest.mark.parametrize("recipe", Fp8Recipe)
@pytest.mark.parametrize("number_format", Fp8Format)
@pytest.mark.parametrize("source", RELEASES["transformer_engine"].sources)
def test_fp8_is_asked_for_as_every_release_takes_it(
    source: str, number_format: Fp8Format, recipe: Fp8Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, needs = RECORDED[source], RECIPES[recipe]
    in_release = recorded[f"{RECIPES_MODULE}:{needs.recipe_class}"]
    is_there = Version(source.partition("==")[2]) >= Version(needs.release)
    assert (in_release is not None) == is_there
    if in_release is None:
        return
    made, entered = Kept(lambda **_: "the recipe"), Kept(lambda **_: nullcontext())
    put(f"{RECIPES_MODULE}:{needs.recipe_class}", made, monkeypatch)
    put(f"{RECIPES_MODULE}:Format", SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID"), monkeypatch)
    put(f"transformer_engine.pytorch:{recorded[AUTOCAST]['name']}", entered, monkeypatch)
    autocast = fp8_autocast(number_format, recipe)
    for _ in range(2):
        with autocast():
            pass
    (made_with,) = made.calls
    assert signature(in_release["parameters"]).bind(*made_with[0], **made_with[1])
    assert made_with == ((), {"fp8_format": number_format.name.upper()})
    assert len(entered.calls) == 2
    for args, kwargs in entered.calls:
        bound = signature(recorded[AUTOCAST]["parameters"]).bind(*args, **kwargs).arguments
        assert bound.pop("enabled") is True
        assert list(bound.values()) == ["the recipe"]


def test_a_call_that_does_not_fit_is_found() -> None:
    recorded = RECORDED["flash-attn==2.8.3"]["flash_attn:flash_attn_func"]["parameters"]
    with pytest.raises(TypeError, match="scale"):
        signature(recorded).bind(1, 2, 3, scale=1.0)


RANGE = Releases(("library==2.1.0", "library==2.8.3"))


@pytest.mark.parametrize(
    "version", ["2.1.0", "2.1.0+cu12", "2.5", "2.8.3", "2.8.3.post2", "2.8.3+metax1", "unknown version"]
)
def test_releases_between_the_oldest_and_the_newest_get_no_warning(version: str) -> None:
    assert RANGE.outside(version) is None


def test_other_releases_are_named_with_what_was_looked_at() -> None:
    ends = "than the releases that its calls were written against (2.1.0 to 2.8.3)"
    assert RANGE.outside("2.0.9") == f"is older {ends}"
    assert RANGE.outside("2.8.4") == RANGE.outside("3.0.0b1") == f"is newer {ends}"
    newest = RELEASES["flash_attn"].versions[-1]
    assert untested({"flash_attn": newest, "triton": "99"}) == {}
    assert untested({"flash_attn": "99.0"})["flash_attn"].startswith("99.0 is newer")
