"""How the environment is made: the choice of the interpreter, and what a failed installation leaves
behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "chmod", "cksum", "cp", "dirname", "grep", "mkdir", "rm")

# Answers the questions that the script asks an interpreter; `-m venv` copies it, `-m pip` records its
# arguments.
INTERPRETER = """#!/usr/bin/env bash
case $* in
*version_info*) case @VERSION@ in 3.10|3.11|3.12) echo @VERSION@ ;; *) exit 1 ;; esac ;;
*ensurepip*) exit @NO_VENV@ ;;
"-m venv "*)
    folder=${*: -1}; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python"
    sees=false; case $* in *--system-site-packages*) sees=true ;; esac
    printf 'include-system-site-packages = %s\\n' "$sees" > "$folder/pyvenv.cfg"
    printf '%s\\n' "$*" >> "$PIP_LOG" ;;
*importlib.metadata*) exec "$PYTHON_OF_TESTS" "$@" ;;
"-m pip "*) printf '%s\\n' "$*" >> "$PIP_LOG"; exit "${PIP_EXIT:-0}" ;;
esac
"""
SHIM_OF_ANOTHER_VERSION = "#!/usr/bin/env bash\necho 'pyenv: python3.11: command not found' >&2\nexit 127\n"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the script needs bash")


class Machine:
    """A machine with nothing on its PATH but a few tools and the given interpreters."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir()
        for tool in TOOLS:
            path = shutil.which(tool)
            assert path is not None
            (self.programs / tool).symlink_to(path)
        self.venv = folder / "venv"
        self.pip_log = folder / "pip.log"
        self.environment = {
            "PATH": str(self.programs),
            "HOME": str(folder),
            "PIP_LOG": str(self.pip_log),
            "PYTHON_OF_TESTS": sys.executable,
        }

    def add(self, name: str, version: str = "", *, has_venv: bool = True, text: str = INTERPRETER) -> None:
        program = self.programs / name
        # `env` is not on this PATH, so the interpreter is named by its full path.
        text = text.replace("/usr/bin/env bash", str(shutil.which("bash")))
        program.write_text(text.replace("@VERSION@", version).replace("@NO_VENV@", "0" if has_venv else "1"))
        program.chmod(0o755)

    def setup(self, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(shutil.which("bash")), str(ROOT / "scripts" / "setup_environment.sh"), str(self.venv)]
        return subprocess.run(
            command, env={**self.environment, **variables}, capture_output=True, text=True, timeout=30
        )

    def pip_calls(self) -> list[str]:
        return self.pip_log.read_text().splitlines() if self.pip_log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_first_working_interpreter_is_taken_and_its_tested_versions(machine: Machine) -> None:
    machine.add("python3.11", text=SHIM_OF_ANOTHER_VERSION)
    machine.add("python3.10", "3.10", has_venv=False)
    machine.add("python3", "3.11")
    result = machine.setup()
    assert result.returncode == 0, result.stderr
    assert "python3 (Python 3.11)" in result.stdout
    extras = "[dev,demo,deepspeed,evaluation,gigatoken,docs,serve]"
    installed = f"--constraint {ROOT}/constraints/py311.txt --editable .{extras}"
    assert installed in machine.pip_calls()[-1]


def test_python_variable_decides(machine: Machine) -> None:
    machine.add("python3.11", "3.11")
    machine.add("mine", "3.11")
    assert "mine (Python 3.11)" in machine.setup(PYTHON="mine").stdout
    assert_one_sentence(machine.setup(PYTHON="python3.9"), "PYTHON=python3.9", "3.10, 3.11 or 3.12")


def test_interpreters_of_pyenv_are_found_behind_its_shims(machine: Machine, tmp_path: Path) -> None:
    machine.add("python3.11", text=SHIM_OF_ANOTHER_VERSION)
    machine.add("hidden", "3.11")
    folder = tmp_path / ".pyenv" / "versions" / "3.11.7" / "bin"
    folder.mkdir(parents=True)
    os.rename(machine.programs / "hidden", folder / "python")
    assert "versions/3.11.7/bin/python (Python 3.11)" in machine.setup().stdout


def test_no_suitable_interpreter_is_one_sentence(machine: Machine) -> None:
    machine.add("python3", "3.9")
    assert_one_sentence(machine.setup(), "no working Python 3.10, 3.11 or 3.12", "PYTHON=")
    assert not machine.venv.exists()


def test_interpreter_without_venv_says_how_to_get_it(machine: Machine) -> None:
    machine.add("python3", "3.11", has_venv=False)
    assert_one_sentence(machine.setup(), "no venv module", "apt-get install python3-venv")


def test_second_call_does_nothing(machine: Machine) -> None:
    machine.add("python3.11", "3.11")
    machine.setup()
    calls = machine.pip_calls()
    result = machine.setup()
    assert result.returncode == 0 and result.stdout == ""
    assert machine.pip_calls() == calls


def test_failed_installation_is_tried_again(machine: Machine) -> None:
    machine.add("python3.11", "3.11")
    assert machine.setup(PIP_EXIT="1").returncode != 0
    assert not (machine.venv / ".installed").exists()
    assert machine.setup().returncode == 0
    assert (machine.venv / ".installed").exists()


def test_another_python_makes_the_environment_anew(machine: Machine) -> None:
    machine.add("python3.11", "3.11")
    machine.add("python3.12", "3.12")
    machine.setup()
    assert "Python 3.12" in machine.setup(PYTHON="python3.12").stdout
    assert "py312.txt" in machine.pip_calls()[-1]


def test_changed_requirements_are_installed(machine: Machine) -> None:
    machine.add("python3.11", "3.11")
    machine.setup()
    calls = len(machine.pip_calls())
    (machine.venv / ".installed").write_text("of an older pyproject.toml\n")
    assert machine.setup().returncode == 0
    assert len(machine.pip_calls()) > calls


def system_packages(folder: Path, **versions: str) -> dict[str, str]:
    """What has an interpreter find packages outside of its environment: names and versions."""
    for name, version in versions.items():
        described = folder / f"{name}-{version}.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return {"PYTHONPATH": str(folder), "SYSTEM_TORCH": "yes"}


def test_the_torch_of_an_image_stays_and_what_is_missing_gets_the_tested_versions(
    machine: Machine, tmp_path: Path
) -> None:
    machine.add("python3.11", "3.11")
    image = system_packages(tmp_path / "image", torch="2.10.0a0+b4e4ee81d3.nv25.12", huggingface_hub="1.0")
    assert machine.setup(**image).returncode == 0
    assert machine.pip_calls()[0] == f"-m venv --clear --system-site-packages {machine.venv}"
    assert f"--constraint {machine.venv}/constraints.txt --editable" in machine.pip_calls()[-1]
    kept = (machine.venv / "constraints.txt").read_text().splitlines()
    tested = (ROOT / "constraints/py311.txt").read_text().splitlines()
    assert kept[-1] == "torch==2.10.0a0+b4e4ee81d3.nv25.12"
    left_out = [line for line in tested if line not in kept]
    assert sorted(line.partition("==")[0] for line in left_out) == ["huggingface_hub", "torch"]
    calls = machine.pip_calls()
    assert machine.setup(**image).returncode == 0 and machine.pip_calls() == calls, (
        "the next call does nothing"
    )


def test_an_environment_that_stands_is_made_anew_where_it_shall_see_the_torch_of_its_interpreter(
    machine: Machine, tmp_path: Path
) -> None:
    machine.add("python3.11", "3.11")
    machine.setup()
    image = system_packages(tmp_path / "image", torch="2.10.0")
    made = len(machine.pip_calls())
    assert machine.setup(**image).returncode == 0
    assert machine.pip_calls()[made] == f"-m venv --clear --system-site-packages {machine.venv}"
    made = len(machine.pip_calls())
    assert machine.setup().returncode == 0
    assert machine.pip_calls()[made] == f"-m venv --clear {machine.venv}", "and back again"


def test_an_image_without_torch_and_a_word_that_is_no_answer_are_one_sentence(
    machine: Machine, tmp_path: Path
) -> None:
    machine.add("python3.11", "3.11")
    assert_one_sentence(machine.setup(**system_packages(tmp_path / "image")), "SYSTEM_TORCH=yes", "no torch")
    assert_one_sentence(machine.setup(SYSTEM_TORCH="1"), "SYSTEM_TORCH=1", "yes nor no")
