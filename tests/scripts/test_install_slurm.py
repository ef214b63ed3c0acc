"""How CI gets Slurm for tests/slurm, with a stand-in for apt-get: never an error, never a service."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "install_slurm.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="it is a bash script")

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
# Writes down how it was called and whether services may start, then does what a mirror lets it.
APT_GET = """#!/usr/bin/env bash
echo "$DEBIAN_FRONTEND ${*: -4}" >> "$RECORD"
"$POLICY" munge start; echo "a service asks: $?" >> "$RECORD"
if [ "$MIRROR" = none ]; then echo "E: Temporary failure resolving" >&2; exit 100; fi
for word in "$@"; do
    [ "$word" != install ] || for name in $DAEMONS; do cp "$BIN/id" "$BIN/$name"; done
done
"""


@pytest.fixture
def machine(tmp_path: Path):
    """Runs the script where nothing of Slurm is there; returns what it prints and what apt-get was asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "sh", "mktemp", "rm", "chmod", "tail", "timeout", "cp"):
        (programs / name).symlink_to(shutil.which(name) or "")
    record, policy = tmp_path / "record", tmp_path / "policy-rc.d"

    def run(*, user: int = 0, apt: bool = True, mirror: str = "here") -> tuple[str, list[str]]:
        scripts = {"id": f"#!/bin/sh\necho {user}\n", **({"apt-get": APT_GET} if apt else {})}
        for name, text in scripts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        source = SCRIPT.read_text().replace("PATH=$PATH:/usr/sbin:/sbin ", "")
        variables = {"RECORD": str(record), "POLICY": str(policy), "MIRROR": mirror, "BIN": str(programs)}
        done = subprocess.run(
            ["bash", "-c", source, "install_slurm.sh", str(policy)],
            env={"PATH": str(programs), "DAEMONS": " ".join(DAEMONS), **variables},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert not policy.exists(), "services of other packages could not start any more"
        return done.stdout, record.read_text().splitlines() if record.exists() else []

    return run


def test_slurm_is_installed_once_and_none_of_its_services_starts(machine) -> None:
    said, calls = machine()
    assert said == "Slurm is now installed\n"
    assert [call.split()[0] for call in calls[::2]] == ["noninteractive", "noninteractive"]
    assert calls[0].endswith(" update") and calls[2].endswith("slurm-wlm munge")
    assert calls[1] == calls[3] == "a service asks: 101"
    assert machine()[0] == "Slurm is installed\n" and len(machine()[1]) == len(calls)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ({"apt": False}, "there is no apt-get here"),
        ({"user": 1000}, "as root: apt-get install slurm-wlm munge"),
        ({"mirror": "none"}, "apt-get update failed (E: Temporary failure resolving)"),
    ],
)
def test_where_it_cannot_be_installed_one_sentence_says_what_skips(machine, where, why) -> None:
    said, _ = machine(**where)
    assert said.count("\n") == 1 and why in said
    assert "the tests of tests/slurm are going to be skipped" in said
