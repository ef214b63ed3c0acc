"""Dockerfiles, taken apart, and carried out without Docker in a copy of this machine's root.

The copy is an overlay: what a step writes is in memory and gone with the process. No more of Docker is stood
in for than the files of docker/ use.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OF_THIS_RUN = ("PYTEST", "MAKE", "MFLAGS", "PYTHON", "VENV", "VIRTUAL_ENV")
FILES = sorted(path.name for path in (ROOT / "docker").glob("*.Dockerfile"))


@dataclass(frozen=True)
class Instruction:
    """One of them: RUN and what stands behind it."""

    name: str
    text: str


def instructions(name: str) -> list[Instruction]:
    """Those of a file of docker/, in their order."""
    lines = [line for line in (ROOT / "docker" / name).read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [Instruction(name, text.strip()) for name, _, text in found]


def ignored(path: Path) -> bool:
    """Whether .dockerignore keeps a path, relative to the root, out of what Docker is sent."""
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if not pattern or pattern.startswith("#"):
            continue
        anywhere = pattern.startswith("**/")
        wanted = pattern.removeprefix("**/")
        names = path.parts if anywhere else path.parts[:1]
        if any(fnmatch.fnmatchcase(name, wanted) for name in names):
            return True
    return False


def write_context(folder: Path) -> None:
    """What ``docker build .`` sends of this checkout."""

    def left_out(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if ignored((Path(directory) / name).relative_to(ROOT))]

    shutil.copytree(ROOT, folder, symlinks=True, ignore=left_out)


def script(steps: list[Instruction], context: Path, given: Mapping[str, str]) -> str:
    """A bash script that does what they say.

    Args:
        steps: of one stage.
        context: what COPY copies from.
        given: build arguments and variables that have another value here.
    """
    lines = ["set -euo pipefail", "user=0"]
    for step in steps:
        words = shlex.split(step.text)
        if step.name in ("ARG", "ENV"):
            for word in words:
                name, _, value = word.partition("=")
                lines.append(
                    f"export {name}={shlex.quote(given[name]) if name in given else _expanded(value)}"
                )
        elif step.name == "WORKDIR":
            lines.append(f"mkdir -p {step.text} && cd {step.text}")
        elif step.name == "USER":
            lines.append(f'user={step.text} HOME=$(getent passwd "$user" | cut -d: -f6)')
        elif step.name == "COPY":
            sources = [word for word in words if not word.startswith("--")]
            owner = next((word.partition("=")[2] for word in words if word.startswith("--chown=")), "0")
            *sources, target = sources
            for source in sources:
                from_ = context / source
                content = "/." if from_.is_dir() else ""
                lines += [
                    f"mkdir -p {target if target.endswith('/') else '.'}",
                    f"cp -a --no-preserve=ownership {shlex.quote(str(from_))}{content} {target}",
                ]
            lines.append(f"chown -R {owner} {target.split('/')[0] if target != './' else '.'}")
        elif step.name == "RUN":
            lines.append(as_user(step.text))
        else:
            assert step.name in ("FROM", "CMD"), f"{step.name} is new here"
    return "\n".join(lines)


def _expanded(value: str) -> str:
    """A value in which bash replaces variables, as Docker does."""
    return f'"{value}"'


def as_user(command: str) -> str:
    """A line of the script that runs a command as the image would: as its user."""
    run = 'setpriv --reuid="$user" --regid="$user" --clear-groups'
    return f"{run} env HOME=${{HOME:-/root}} sh -ec {shlex.quote(command)}"


OVERLAY = """
set -euo pipefail
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
for each in proc dev sys; do mount --rbind "/$each" "$1/root/$each"; done
shift_to=$1/root
shift
exec chroot "$shift_to" "$@"
"""
"""Runs a command in a copy of this machine: a folder for it, then the command."""


def in_copy(folder: Path, *command: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in a copy of this machine's root; ``folder`` is an empty one."""
    return subprocess.run(
        ["unshare", "--mount", "bash", "-c", OVERLAY, "overlay", str(folder), *command],
        # What this run of the tests and its make were told is nothing of an image's.
        env={name: os.environ[name] for name in os.environ if not name.startswith(_OF_THIS_RUN)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
