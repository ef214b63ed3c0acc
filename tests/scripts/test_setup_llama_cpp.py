"""scripts/setup_llama_cpp.sh with a stand-in for pip: what it builds, once; what it leaves when it fails."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup_llama_cpp.sh"
pytestmark = pytest.mark.skipif(shutil.which("flock") is None, reason="it needs flock of util-linux")

PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo 311; exit; fi
echo "$*" >>"$RECORD"; echo "$CMAKE_ARGS" >"$RECORD.cmake"
while [ "$1" != --target ]; do shift; done
mkdir "$2"; sleep 0.3; exit "$PIP_ENDS_WITH"
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path / "venv"


def begun(venv: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {"RECORD": str(venv / "record"), "PIP_ENDS_WITH": "0", "CC": "sh", "CXX": "sh", **environment}
    return subprocess.Popen(
        ["bash", str(SCRIPT), str(venv)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output + errors


def test_of_several_calls_one_builds_and_all_find_it(venv: Path) -> None:
    calls = [begun(venv) for _ in range(3)]
    assert [ended(call)[0] for call in calls] == [0, 0, 0]
    assert ended(begun(venv)) == (0, "")
    (pip,) = (venv / "record").read_text().splitlines()
    assert "--no-cache-dir" in pip and "llama_cpp_python==" in pip and "diskcache==" in pip
    words = shlex.split((venv / "record.cmake").read_text())
    assert "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG" in words and all(word.startswith("-D") for word in words)
    assert {path.name for path in venv.parent.iterdir()} == {"venv", "venv-llama-cpp"}


def test_a_build_that_fails_is_tried_again(venv: Path) -> None:
    code, said = ended(begun(venv, PIP_ENDS_WITH="1"))
    assert code == 2 and "the next call tries again" in said
    assert not (venv.parent / "venv-llama-cpp").exists()
    assert ended(begun(venv))[0] == 0
    assert (venv.parent / "venv-llama-cpp" / ".installed").exists()


def test_without_a_compiler_it_says_what_to_install(venv: Path) -> None:
    code, said = ended(begun(venv, CXX="no-such-compiler"))
    assert code == 2 and "there is no compiler for C and C++; install one" in said
    assert not (venv / "record").exists()
