"""Which versions the test matrix runs, and how it reports what it could not run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# An interpreter of a given version, and the environment that the setup script would make of it.
INTERPRETER = """#!{bash}
case $* in
*version_info*) echo {version} ;;
"-m pytest"*) echo "pytest of {version}: $*, $OMP_NUM_THREADS thread"; exit {pytest_exit} ;;
esac
"""
SETUP = """#!{bash}
case $PYTHON in *$BROKEN) echo 'error: no disk space' >&2; exit 2 ;; esac
mkdir -p "$1/bin"; cp "$PYTHON" "$1/bin/python"
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the script needs bash")


class Machine:
    """A copy of the script on a machine that has just the given interpreters."""

    def __init__(self, folder: Path) -> None:
        self.bash = str(shutil.which("bash"))
        self.folder, self.programs = folder, folder / "bin"
        (folder / "scripts").mkdir()
        self.programs.mkdir()
        for tool in ("dirname", "mkdir", "cp"):
            (self.programs / tool).symlink_to(str(shutil.which(tool)))
        shutil.copy(ROOT / "scripts" / "test_matrix.sh", folder / "scripts")
        self._write(folder / "scripts" / "setup_environment.sh", SETUP.format(bash=self.bash))

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def add(self, version: str, *, place: str = "", reports: str = "", pytest_exit: int = 0) -> None:
        path = self.folder / place if place else self.programs / f"python{version}"
        text = INTERPRETER.format(bash=self.bash, version=reports or version, pytest_exit=pytest_exit)
        self._write(path, text)

    def run(self, *versions: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bash, str(self.folder / "scripts" / "test_matrix.sh"), *versions],
            env={"PATH": str(self.programs), "HOME": str(self.folder), "BROKEN": "none", **variables},
            capture_output=True,
            text=True,
            timeout=30,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_every_version_that_is_there_runs_the_suite(machine: Machine) -> None:
    machine.add("3.10")
    machine.add("3.12", place=".pyenv/versions/3.12.1/bin/python")
    result = machine.run(PYTEST_ARGS="-x -q")
    assert result.returncode == 0, result.stderr
    assert "pytest of 3.10: -m pytest -n auto -x -q, 1 thread" in result.stdout
    assert "pytest of 3.12" in result.stdout
    assert "Python 3.11  skipped: no interpreter" in result.stdout
    assert (machine.folder / ".venv-py310").is_dir() and (machine.folder / ".venv-py312").is_dir()


def test_one_failing_suite_fails_the_matrix_and_the_others_still_run(machine: Machine) -> None:
    machine.add("3.10", pytest_exit=1)
    machine.add("3.11")
    result = machine.run()
    assert result.returncode == 1
    assert "Python 3.10  FAILED (pytest exit 1)" in result.stdout
    assert "Python 3.11  passed" in result.stdout


def test_named_version_must_be_there(machine: Machine) -> None:
    machine.add("3.11")
    result = machine.run("3.10")
    assert result.returncode == 2
    assert "error: no working Python 3.10" in result.stderr
    assert "pytest of" not in result.stdout


def test_interpreter_of_another_version_under_the_name_is_not_taken(machine: Machine) -> None:
    machine.add("3.10", reports="3.9")
    result = machine.run()
    assert result.returncode == 2
    assert "none of Python 3.10 3.11 3.12 works here" in result.stderr


def test_environment_that_cannot_be_made_is_reported(machine: Machine) -> None:
    machine.add("3.11")
    machine.add("3.12")
    result = machine.run(BROKEN="python3.12")
    assert result.returncode == 2
    assert "Python 3.12  FAILED: its environment could not be made" in result.stdout
    assert "Python 3.11  passed" in result.stdout


def test_unsupported_version_is_one_sentence(machine: Machine) -> None:
    result = machine.run("3.13")
    assert result.returncode == 2
    assert result.stderr == "error: Python 3.13 is not supported; choose from 3.10 3.11 3.12\n"
