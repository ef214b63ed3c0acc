"""What surrounds the code says what is true: hooks, workflow, templates, changelog, citation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import spikingbrain_train

ROOT = Path(__file__).resolve().parents[1]


def _read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def _pyproject(field: str) -> str:
    # tomllib is not in Python 3.10.
    found = re.search(rf'^{field} = "([^"]*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def _make_targets() -> set[str]:
    return set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _target(command: str) -> str:
    """The only target of a call of make without other options; it must exist."""
    found = re.fullmatch(r"make --no-print-directory ([a-z-]+)", command.strip())
    assert found is not None, f"{command!r} is not one make target"
    assert found[1] in _make_targets()
    return found[1]


def _targets_of_ci_run() -> list[str]:
    script = (ROOT / ".ci" / "run").read_text()
    return [_target(command) for command in re.findall(r"^step .*?(make --.*?)(?: \|\|.*)?$", script, re.M)]


def test_the_workflow_runs_what_ci_run_does_on_every_supported_python() -> None:
    (job,) = _read(".github/workflows/ci.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert [_target(command) for command in commands] == _targets_of_ci_run()
    assert set(commands) == {f"make --no-print-directory {target}" for target in _targets_of_ci_run()}
    supported = re.findall(
        r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text()
    )
    assert job["strategy"]["matrix"]["python"] == supported
    constraints = {path.name for path in (ROOT / "constraints").glob("py*.txt")}
    assert constraints == {f"py{version.replace('.', '')}.txt" for version in supported}
    assert job["env"]["PYTHON"] == "python${{ matrix.python }}"


def test_the_workflow_takes_actions_of_one_version_and_may_only_read() -> None:
    workflow = _read(".github/workflows/ci.yml")
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", action) for action in used), used
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_git_hooks_call_make_targets_and_fetch_nothing() -> None:
    repositories = _read(".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert {_target(hook["entry"]) for hook in hooks} >= {"lint", "typecheck"}
    for hook in hooks:
        assert hook["language"] == "system" and hook["pass_filenames"] is False


@pytest.mark.parametrize("name", ["bug.yml", "proposal.yml"])
def test_issue_forms_are_forms(name: str) -> None:
    form = _read(f".github/ISSUE_TEMPLATE/{name}")
    assert form["name"] and form["description"]
    for field in form["body"]:
        assert field["type"] in ("textarea", "dropdown") and field["attributes"]["label"]
    identities = [field["id"] for field in form["body"]]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize(
    "page", [".github/PULL_REQUEST_TEMPLATE.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"]
)
def test_pages_name_make_targets_that_exist(page: str) -> None:
    calls = re.findall(r"(?:^|`)make ([^`#\n]*)", (ROOT / page).read_text(), re.MULTILINE)
    named = {word for call in calls for word in call.split() if re.fullmatch(r"[a-z][a-z-]*", word)}
    assert named and named <= _make_targets()


def test_the_version_is_the_same_everywhere() -> None:
    version = _pyproject("version")
    assert spikingbrain_train.__version__ == version
    assert _read("CITATION.cff")["version"] == version
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for heading in re.findall(r"^## (.+)$", text, re.MULTILINE):
        assert re.fullmatch(r"\[Unreleased\]|\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading), heading
    for release in text.split("\n## ")[1:]:
        groups = re.findall(r"^### (.+)$", release, re.MULTILINE)
        order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert groups == sorted(groups, key=order.index) and len(set(groups)) == len(groups)


def test_the_citation_names_software_and_paper() -> None:
    citation = _read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"] == _pyproject("name") and citation["license"] == _pyproject("license")
    assert citation["message"] and citation["authors"]
    (paper,) = citation["references"]
    assert paper["type"] == "article" and paper["title"] and paper["authors"]
    assert {"type": "doi", "value": "10.48550/arXiv.2509.05276"} in paper["identifiers"]
