"""Images: what their files may say, and the steps of the CPU's, carried out without Docker."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.dockerfile import (
    FILES,
    ROOT,
    as_user,
    ignored,
    in_copy,
    instructions,
    script,
    write_context,
)

STEPS = (
    r"docker/install\.sh (system|user|kernels) .*",
    r"(PYTHON=\$PYTHON )?scripts/setup_environment\.sh \"\$VENV\"",
)
"""What images run: their steps are scripts, so that they can run elsewhere."""


@pytest.mark.parametrize("name", FILES)
def test_an_image_runs_scripts_of_the_checkout_and_not_as_root(name: str) -> None:
    steps = instructions(name)
    for step in steps:
        for command in step.text.split(" && ") if step.name == "RUN" else ():
            assert any(re.fullmatch(known, command.strip()) for known in STEPS), command
    users = [step.text for step in steps if step.name == "USER"]
    assert users[-1] == "$USER_ID" and "USER_ID=1000" in [step.text for step in steps if step.name == "ARG"]
    assert "PIP_NO_CACHE_DIR=1" in " ".join(step.text for step in steps if step.name == "ENV")


@pytest.mark.parametrize("name", FILES)
def test_what_an_image_copies_is_there_and_sent_to_docker(name: str) -> None:
    for step in instructions(name):
        if step.name == "COPY":
            sources = [word for word in shlex.split(step.text) if not word.startswith("--")][:-1]
            assert sources and all((ROOT / source).exists() for source in sources)
            assert not any(ignored(Path(source)) for source in sources)


def test_files_of_the_repository_are_sent_and_what_a_checkout_makes_is_not() -> None:
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert [path for path in listed.stdout.splitlines() if ignored(Path(path))] == []
    made = (".git/config", ".venv/bin/python", ".venv-kernels/x", "outputs/demo", "tests/__pycache__/x.pyc")
    assert all(ignored(Path(path)) for path in (*made, ".pytest_cache/x", "a.egg-info/x", "data/web_train"))


def test_a_step_that_is_none_is_one_sentence() -> None:
    done = subprocess.run([ROOT / "docker/install.sh", "clean"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no such step" in done.stderr and done.stderr.count("\n") == 1


def test_kernels_need_an_environment(tmp_path: Path) -> None:
    command = [ROOT / "docker/install.sh", "kernels", "flash-linear-attention"]
    environment = {**os.environ, "VENV": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and f"VENV={tmp_path}" in done.stderr


def why_not() -> str | None:
    """Why the steps of an image cannot be carried out here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root: a copy of the root is mounted"
    if missing := [name for name in ("unshare", "setpriv", "apt-get") if shutil.which(name) is None]:
        return f"{', '.join(missing)} missing"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "this machine lets nobody mount"
    environment = Path(sys.prefix)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    parts = [
        ROOT / "pyproject.toml",
        ROOT / f"constraints/py{version.replace('.', '')}.txt",
        ROOT / "scripts/setup_environment.sh",
    ]
    content = b"".join(path.read_bytes() for path in parts)
    sum_ = subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout.decode()
    stamp = environment / ".installed"
    if not stamp.exists() or stamp.read_text() != f"python {version}\n{sum_}":
        return f"{environment} is not what `make environment` would make of this checkout"
    return None


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif((why := why_not()) is not None, reason=str(why))
def test_the_steps_of_the_cpu_image_leave_its_user_with_the_two_commands(tmp_path: Path) -> None:
    """The installation itself is the one that made this environment, by the same script; it finds it done."""
    write_context(context := tmp_path / "context")
    (root := tmp_path / "root").mkdir()
    # The image's user has to reach this environment, which is in the place of /opt/venv, and its interpreter.
    reach = {Path(sys.prefix), Path(sys.base_prefix), context, tmp_path}
    folders = sorted({folder for path in reach for folder in (path, *path.parents)} - {Path("/")})
    lines = [
        f"chmod a+rx {shlex.join(map(str, folders))}",
        script(instructions("cpu.Dockerfile"), context, {"VENV": sys.prefix, "PIP_EXTRA_INDEX_URL": ""}),
        "echo == steps done",
        as_user('id -u; pwd; test -w . && echo writable; ls -A | head -n 100 | tr "\\n" " "; echo'),
        as_user("make --no-print-directory test PYTEST_ARGS='-n 0 -q tests/test_kind_names.py'"),
        as_user("make --no-print-directory demo MODEL=nowhere || echo == demo ended with $?"),
    ]
    done = in_copy(root, "bash", "-c", "\n".join(lines))
    said = done.stdout + done.stderr
    if done.returncode and "Could not resolve" in said:
        pytest.skip("apt-get reaches no mirror")
    assert done.returncode == 0, said
    _, _, after = done.stdout.partition("== steps done\n")
    user, folder, writable, content, *rest = after.splitlines()
    assert (user, folder, writable) == ("1000", "/workspace/spikingbrain-train", "writable"), said
    assert {"Makefile", "conf", "spikingbrain_train", "tests"} <= set(content.split())
    assert not {".git", ".venv", "outputs"} & set(content.split())
    assert re.search(r"^\d+ passed", "\n".join(rest), re.M), said
    assert "== demo ended with" in said and "nowhere" in done.stderr, said
    assert not Path("/workspace/spikingbrain-train").exists(), "a step has left its copy"
