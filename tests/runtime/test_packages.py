"""Optional packages count as usable only if their kernels can be called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spikingbrain_train.architecture.backends.backend import Machine
from spikingbrain_train.architecture.backends.softmax_attention import (
    SOFTMAX_ATTENTION,
    SoftmaxAttentionCall,
)
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.runtime.packages import defines, has_package, machine_of, package_failure

CALL = SoftmaxAttentionCall("bfloat16", key_dim=64, value_dim=64, num_text_keys=32)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in front of all others; what is imported from it is forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    for name in ("flash_attn", "grouped_gemm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    package_failure.cache_clear()
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]
    package_failure.cache_clear()


def test_a_package_whose_kernel_is_there_can_be_used(packages: Path) -> None:
    (packages / "flash_attn.py").write_text("def flash_attn_func(): ...")
    assert has_package("flash_attn")


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "does not import .undefined symbol: _ZN3c10"),
        (
            "raise RuntimeError('built for another torch\\nand more')",
            "does not import .built for another torch\\)",
        ),
        ("", "has no flash_attn.flash_attn_func"),
    ],
    ids=["another ABI", "another torch", "another package of that name"],
)
def test_a_package_that_is_installed_but_cannot_be_used_is_as_good_as_missing(
    packages: Path, code: str, failure: str
) -> None:
    (packages / "flash_attn.py").write_text(code)
    assert not has_package("flash_attn")
    sentence = f"needs the package flash-attn, which is installed but {failure}"
    with pytest.raises(PlatformError, match=sentence):
        SOFTMAX_ATTENTION.choose("flash_attn", CALL, machine_of("cuda"))


def test_a_package_that_is_missing_is_named() -> None:
    assert package_failure("there_is_no_such_package") == "is not installed"
    bare = Machine(is_gpu=True, package_failure=lambda name: "is not installed", defines=lambda name: True)
    sentence = "softmax_attention=flash_attn needs the package flash-attn, which is not installed; install it"
    with pytest.raises(PlatformError, match=f"^cluster.kernels.{sentence} or choose auto$"):
        SOFTMAX_ATTENTION.choose("flash_attn", CALL, bare, "cluster.kernels.")


def test_what_a_release_lacks_is_told_from_what_it_has(packages: Path) -> None:
    (packages / "some_release.py").write_text("here = 1\nknown_but_missing = None")
    assert defines("some_release:here")
    assert not defines("some_release:known_but_missing") and not defines("some_release:unknown")
