"""Every command of the pages: run at small size, or composed and laid out as it is.

A page's commands run in their order in one folder, so that each finds what those before it have made. RULES
is the table of what is done to which; a command that no rule knows fails here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import pytest

from spikingbrain_train.errors import SpikingBrainError
from tests.docs.pages import PAGES, Command, commands, fenced
from tests.docs.small import Workplace, installed, launched, parses, shortened, write_files
from tests.programs import Finished, Programs


class Way(Enum):
    """What is done to a command."""

    AS_IT_IS = "run, word by word"
    SHORT = "run, with less text, shorter windows, fewer tokens"
    TRAINED = "planned at full size for all its ranks, then run at small size on one or two"
    PLANNED = "planned at full size for all its ranks"
    DRY = "run as a dry run"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Rule:
    """What is done to commands that begin with a pattern."""

    command: str
    way: Way
    why: str = ""
    """Of what is not run."""
    pages: str = ".*"
    """Where."""


README, GUIDES, PICTURES = r"README\.md", r"docs/guides/.*", r"docs/(pictures|metrics)\.md"
METRICS = r"docs/metrics\.md"
RULES = (
    Rule("spikingbrain-preprocess ", Way.SHORT),
    Rule(
        "spikingbrain-cache-teacher ",
        Way.NOT_RUN,
        "is of a run's own lengths, which are shorter here; tests/distributed writes caches",
    ),
    Rule("spikingbrain-profile-step ", Way.AS_IT_IS),
    Rule("spikingbrain-convert ", Way.AS_IT_IS),
    Rule("spikingbrain-choose-layers ", Way.SHORT),
    Rule("spikingbrain-evaluate ", Way.SHORT),
    Rule("spikingbrain-generate ", Way.SHORT),
    Rule("spikingbrain-analyze-spikes ", Way.SHORT),
    Rule("spikingbrain-analyze-sparsity ", Way.SHORT),
    Rule("spikingbrain-bricks neurons ", Way.SHORT),
    Rule("spikingbrain-bricks abilities ", Way.SHORT),
    Rule("spikingbrain-export ", Way.AS_IT_IS),
    Rule("spikingbrain-serve ", Way.NOT_RUN, "waits; tests/evaluation/test_chat_server.py starts one"),
    Rule("curl ", Way.NOT_RUN, "tests/evaluation/test_chat_server.py sends the same requests"),
    Rule("spikingbrain-health-check ", Way.AS_IT_IS),
    Rule("spikingbrain-plot ", Way.NOT_RUN, "its runs are no page's; tests/reporting draws such", PICTURES),
    Rule("spikingbrain-plot ", Way.AS_IT_IS),
    Rule("spikingbrain-plan ", Way.AS_IT_IS),
    Rule("spikingbrain-plan-parallel ", Way.AS_IT_IS),
    Rule(r"spikingbrain-train .*(--help|dry_run=true|--cfg)", Way.AS_IT_IS),
    Rule("spikingbrain-train --multirun ", Way.DRY),
    Rule("spikingbrain-train --config ", Way.AS_IT_IS),
    Rule("spikingbrain-train --nproc-per-node ", Way.PLANNED, pages=f"{README}|{METRICS}"),
    Rule(r"spikingbrain-train .*stage\.distillation\.cache=", Way.PLANNED),
    Rule("spikingbrain-train ", Way.TRAINED),
    Rule(
        "sbatch --test-only|squeue |tail |scancel ",
        Way.NOT_RUN,
        "ask Slurm itself; tests/slurm/test_first_run_page.py runs them on one",
        GUIDES,
    ),
    Rule("sbatch ", Way.PLANNED, pages=README),
    Rule("sbatch ", Way.TRAINED, pages=GUIDES),
    Rule("spikingbrain-pipeline (dry-run|status) ", Way.AS_IT_IS),
    Rule("spikingbrain-pipeline run ", Way.DRY),
    Rule("spikingbrain-pipeline submit .*--dry-run", Way.AS_IT_IS),
    Rule(
        "spikingbrain-download-smollm2 ",
        Way.NOT_RUN,
        "tests/pipelines/demo has a stand-in",
    ),
    Rule(
        "lm_eval ", Way.NOT_RUN, "fetches questions; tests/distributed/test_multiple_choice.py has local ones"
    ),
    Rule("hf download ", Way.NOT_RUN, "fetches a model; a tiny one stands in its place"),
    Rule("pip install |vllm serve ", Way.NOT_RUN, "tests/vllm_plugin has vLLM answer where it is installed"),
    Rule("docker ", Way.NOT_RUN, "has no daemon; tests/docker carries out the steps of the CPU's image"),
    Rule("make ", Way.NOT_RUN, "tests/test_habits.py and tests/scripts/test_makefile.py hold its targets"),
    Rule("git clone |cd |source |bash .ci/run", Way.NOT_RUN, "of the reader's shell"),
)


def rule_for(command: Command) -> Rule | None:
    """The first rule that knows a command."""
    return next(
        (
            rule
            for rule in RULES
            if re.match(rule.command, f"{command.text} ") and re.fullmatch(rule.pages, command.page)
        ),
        None,
    )


ALL = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("page", PAGES)
def test_bash_can_read_every_block(page: str) -> None:
    assert all(parses(block.replace("<this repository>", "URL")) for _, block in fenced(page, "bash"))


def test_every_command_is_known() -> None:
    unknown = [
        f"{command}\n  is new here: add a rule for it to RULES in tests/docs/test_commands.py"
        for command in ALL
        if rule_for(command) is None
    ]
    assert not unknown, "\n".join(unknown)


def test_every_rule_has_a_command_and_a_reason_where_nothing_runs() -> None:
    used = {rule_for(command) for command in ALL}
    assert [rule.command for rule in RULES if rule not in used] == []
    assert all(bool(rule.why) == (rule.way is Way.NOT_RUN) for rule in RULES)


def test_commands_of_this_project_are_installed() -> None:
    named = {command.words[0] for command in ALL if command.words[0].startswith("spikingbrain-")}
    assert named <= installed()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, programs: Programs) -> Workplace:
    """A checkout in which the README's commands have run."""
    place = Workplace(tmp_path_factory.mktemp("checkout"), programs)
    place.failures = follow("README.md", place)
    return place


def follow(page: str, place: Workplace) -> list[str]:
    """Do with every command of a page what its rule says; what failed, with what it said."""
    write_files(page, place.folder)
    failures = []
    for command in commands(page):
        rule = rule_for(command)
        if rule is None or rule.way is Way.NOT_RUN:
            continue
        try:
            ended = carry_out(command, rule.way, place)
        except (AssertionError, SpikingBrainError) as error:
            ended = Finished(1, "", f"{type(error).__name__}: {error}", 0.0)
        print(f"{ended.seconds:5.1f} s  {rule.way.value}: {command}")
        if ended.code:
            failures.append(f"{command}\n  ended with {ended.code}: {ended.said[-3000:]}")
    return failures


def carry_out(command: Command, way: Way, place: Workplace) -> Finished:
    """Do it."""
    words = list(command.words)
    if way in (Way.TRAINED, Way.PLANNED):
        arguments, ranks = launched(words, place.folder / ".slurm")
        config = place.plan(arguments, ranks)
        return place.train(arguments, config, ranks) if way is Way.TRAINED else Finished(0, "", "", 0.0)
    if way is Way.DRY and words[0] == "spikingbrain-pipeline":
        words[1] = "dry-run"
    elif way is Way.DRY:
        words.append("dry_run=true")
    return place.run(shortened(words) if way is Way.SHORT else words)


def is_followed(page: str) -> bool:
    """Whether anything of a page is run."""
    rules = [rule_for(command) for command in commands(page)]
    return any(rule is not None and rule.way is not Way.NOT_RUN for rule in rules)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_can_be_followed(workplace: Workplace) -> None:
    assert not workplace.failures, "\n\n".join(workplace.failures)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and is_followed(page)])
def test_a_page_can_be_followed(page: str, workplace: Workplace) -> None:
    before = workplace.made()
    failures = follow(page, workplace)
    workplace.forget(before)
    assert not failures, "\n\n".join(failures)
