"""Variables of clusters (scripts/slurm/env): each says why it is there, and what a user has set stays."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.scripts.allocation import SLURM, Allocation

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the launchers are bash scripts")

FILES = sorted((SLURM / "env").glob("*.env"))
_EXPORT = re.compile(r"\s*export (\w+)=(.*)")
EXTENDED = {"PATH", "LD_LIBRARY_PATH"}
"""What is there already comes behind what the file adds."""


def _exports(path: Path) -> dict[str, str]:
    """Variable -> the line above it."""
    lines = path.read_text().splitlines()
    matches = {number: _EXPORT.fullmatch(line) for number, line in enumerate(lines)}
    return {match[1]: lines[number - 1] for number, match in matches.items() if match}


def _sourced(path: Path, variables: dict[str, str]) -> dict[str, str]:
    """The environment once the file is sourced as launch.sh does."""
    done = subprocess.run(
        ["bash", "-c", 'set -euo pipefail; . "$0"; env -0', path],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.parametrize("image", ["", "/images/train.sif"])
def test_every_variable_has_its_reason_and_what_is_set_already_stays(path: Path, image: str) -> None:
    exports = _exports(path)
    assert exports and len(_sourced(path, {})) >= 2
    for name, above in exports.items():
        assert len(above.strip().removeprefix("#").split()) >= 4, f"{path.name}: why is {name} set?"
    own = {name: f"/mine/{name}" for name in exports}
    seen = _sourced(path, {**own, "PATH": f"/usr/bin:/bin:{own.get('PATH', '')}", "CONTAINER_IMAGE": image})
    # What a file sets whatever there is, it says at its head.
    always = path.read_text().split("\n\n", 1)[0].partition("but for")[2]
    for name in exports:
        if name in EXTENDED:
            assert seen[name].endswith(own[name]), name
        elif name in always:
            assert seen[name].startswith(own["MACA_PATH"]), name
        else:
            assert seen[name] == own[name], f"{path.name} overrides the user's {name}"


def test_the_page_of_gpu_settings_has_each_variable_of_nvidia_with_its_value() -> None:
    page = (SLURM.parents[1] / "docs/gpu_settings.md").read_text()
    values = _sourced(SLURM / "env/nvidia.env", {})
    exported = _exports(SLURM / "env/nvidia.env").keys() - {"CONTAINER_ARGS"}
    assert len(exported) >= 6
    for name in sorted(exported):
        row = next(line for line in page.splitlines() if line.startswith("| `") and f"`{name}`" in line)
        assert values[name] in row, f"docs/gpu_settings.md: {name} is {values[name]} there"


def test_there_are_variables_for_each_cluster_that_has_a_batch_script() -> None:
    assert {path.stem for path in FILES} == {path.stem for path in SLURM.glob("*.sbatch")} - {"step"}


def test_a_user_chooses_variables_by_name_or_path_and_another_name_is_refused(
    tmp_path: Path, allocation: Allocation
) -> None:
    own = tmp_path / "site.env"
    own.write_text("export NCCL_SOCKET_IFNAME=ib0 NPROC_PER_NODE=3\n")
    assert allocation.run(script="nvidia.sbatch", CLUSTER_ENV=str(own)).returncode == 0
    seen = allocation.called("env1")
    assert "NCCL_SOCKET_IFNAME=ib0" in seen and not any(line.startswith("NCCL_DEBUG=") for line in seen)
    assert "--nproc-per-node=3" in allocation.called("torchrun1")
    refused = allocation.run(CLUSTER_ENV="amd")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "CLUSTER_ENV=amd names no variables; there are cpu, metax, nvidia, or" in refused.stderr


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)
