"""The wheel, installed without the checkout beside it: every command starts, and the small road works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from spikingbrain_train.commands.table import COMMANDS
from tests.programs import Programs
from tests.small_source import save_small_source

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Installed:
    """An environment with the wheel, in which the libraries of this one can be imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._programs = folder / "environment" / "bin"
        wheel = _build(folder)
        venv.create(folder / "environment", symlinks=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = folder / "environment" / "lib" / version / "site-packages"
        # Their folder alone: its .pth files, and with them an editable installation, are not read.
        (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(self._programs / "python"), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
        self.python = str(self._programs / "python")
        self.package = packages / "spikingbrain_train"
        self.work = folder / "work"
        self.work.mkdir()

    def __call__(self, *command: str, code: int = 0) -> str:
        """What a command prints in a folder that is no checkout."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {
            "PATH": f"{self._programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            command,
            cwd=self.work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == code, (command, done.stdout[-4000:])
        return done.stdout


def _build(folder: Path) -> Path:
    source = folder / "source_tree"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("spikingbrain_train", "conf"):
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave_out)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    if _setuptools_is_here():  # else pip fetches it
        build.append("--no-build-isolation")
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _setuptools_is_here() -> bool:
    """The one that pyproject.toml asks for."""
    try:
        return int(metadata.version("setuptools").partition(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_is_what_is_imported_and_it_carries_the_configs(installed: Installed) -> None:
    code = (
        "import spikingbrain_train as s; from spikingbrain_train.config.yaml_files import conf_folder as f; "
        "from spikingbrain_train.pipelines.pipeline_file import checkout as c; print(s.__file__, f(), c())"
    )
    where = installed("python", "-c", code).split()
    assert where == [str(installed.package / "__init__.py"), str(installed.package / "conf"), "None"]
    packed = {
        str(path.relative_to(installed.package / "conf")) for path in installed.package.glob("conf/**/*.yaml")
    }
    assert packed == {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").glob("**/*.yaml")}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_explains_itself(installed: Installed, command) -> None:
    said = installed(command.program, "--help")
    assert said.startswith("usage: " + command.program) or f"  {command.program} " in said


@pytest.fixture(scope="module")
def command(installed: Installed) -> Iterator[Callable[..., str]]:
    """What a command of the wheel prints, run in a process that has imported what is slow."""
    with Programs(python=installed.python, path=None) as programs:

        def run(name: str, *arguments: str) -> str:
            words = ["-m", "spikingbrain_train", name.removeprefix("spikingbrain-"), *arguments]
            done = programs.run(words, installed.work)
            assert done.code == 0, (words, done.said[-4000:])
            return done.output

        yield run


def test_the_small_road(installed: Installed, command: Callable[..., str]) -> None:
    save_small_source(installed.work / "source")
    documents = [{"text": f"The for statement number {n} iterates. " * 12} for n in range(60)]
    (installed.work / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    tokenize = ("--input", "text.jsonl", "--tokenizer", "source", "--output-prefix", "data/text")
    command("spikingbrain-preprocess", *tokenize, "--valid-fraction", "0.3")
    hybrid = ("--output", "hybrid", "--conversion", "spikingbrain_7b", "sliding_window=16")
    command("spikingbrain-convert", "import", "--hf", "source", *hybrid)
    assert "GLA" in command("spikingbrain-convert", "inspect", "hybrid").upper()
    run = (
        *("checkpoint.load=hybrid", "data.train=[data/text_train]", "data.valid=[data/text_valid]"),
        *("stage.seq_length=64", "stage.train_iters=5", "stage.global_batch_size=2", "cluster=cpu"),
        *("optimizer.lr_warmup_iters=0", "logging.log_interval=1", "logging.tensorboard=false"),
        *("precision=fp32", "output_dir=run"),
    )
    assert "parameters" in command("spikingbrain-plan", *run)
    trained = installed("spikingbrain-train", "--nproc-per-node", "2", *run)
    assert "iteration 5/5" in " ".join(trained.split())
    command("spikingbrain-export", "--checkpoint", "run", "--output", "export")
    measure = ("--model", "export", "--data", "data/text_valid", "--seq-length", "64", "--trust-remote-code")
    assert "cross entropy" in command("spikingbrain-evaluate", *measure)
    prompt = ("--model", "export", "--prompt", "The for", "--max-new-tokens", "3", "--trust-remote-code")
    assert "tokens/s" in command("spikingbrain-generate", *prompt)
    command("spikingbrain-plot", "run", "--output", "loss.png")
    assert (installed.work / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_pipelines_are_planned_with_the_installed_commands(installed: Installed) -> None:
    source = installed.folder / "dense"
    save_small_source(source)
    described = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**described, "max_position_embeddings": 2048}))
    said = installed("spikingbrain-pipeline", "dry-run", "demo", f"model={source}", "output=demo")
    assert "\nspikingbrain-convert import --hf" in said and "\nspikingbrain-train " in said
    assert "\nspikingbrain-preprocess " in installed(
        "spikingbrain-demo", "--output", "demo", "--model", str(source), "--dry-run"
    )
    said = installed("spikingbrain-pipeline", "dry-run", "spikingbrain_7b")
    assert "\nspikingbrain-plot " in said
