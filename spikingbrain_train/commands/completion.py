"""``spikingbrain-completion``: what a shell offers when a user presses TAB behind a command of this project.

Nothing here imports torch: a suggestion takes as long as Python needs to read the configs.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, get_args

from spikingbrain_train.commands.completion_scripts import SCRIPTS, completion_parser
from spikingbrain_train.commands.parsers import PARSERS
from spikingbrain_train.commands.ranks import FLAGS as RANK_FLAGS
from spikingbrain_train.config.command_line import user_errors

_PROGRAMS = {f"spikingbrain-{name}": name for name in ("train", "plan", *PARSERS)}
_RUN_FLAGS = ("--help", "--cfg", "--resolve", "--config", "--info", "--multirun", "--submit")
_CFG = ("job", "hydra", "all")


def completion(arguments: Sequence[str] | None = None) -> None:
    """``spikingbrain-completion``: print a shell's script, or answer it."""
    parsed = completion_parser().parse_args(arguments)
    with user_errors():
        if parsed.shell == "suggest":
            print("\n".join(suggested(parsed.line, parsed.breaks)))
        else:
            print(SCRIPTS[parsed.shell].replace("PROGRAMS", " ".join(_PROGRAMS)), end="")


def suggested(line: str, breaks: str) -> list[str]:
    """The answer to a shell: whether files fit (``+files`` or ``-files``), then the words.

    Args:
        line: up to the cursor.
        breaks: letters at which the shell itself divides words; it wants what follows the last of them.
    """
    found, files = suggestions(line)
    typed = re.split(r"\s", line)[-1]
    cut = max((typed.rfind(letter) for letter in breaks if letter in "=:"), default=-1) + 1
    return ["+files" if files else "-files", *(word[cut:] for word in found)]


def suggestions(line: str) -> tuple[list[str], bool]:
    """What may stand where a line ends.

    Args:
        line: from its start to the cursor, as the user has typed it.

    Returns:
        Whole words in place of the last one, and whether names of files fit, too.
    """
    words = _words(line)
    program = next((n for n in reversed(range(len(words))) if _command(words[n]) is not None), None)
    if program is None or program == len(words) - 1:
        return [], False
    name, before, word = _command(words[program]), words[program + 1 : -1], words[-1]
    if name in ("train", "plan"):
        found, files = _of_run(before, word)
        if name == "plan" and word.startswith("-"):
            found = [*found, "--json"]
    else:
        assert name is not None
        found, files = _of_parser(PARSERS[name](), before, word)
    return sorted({candidate for candidate in found if candidate.startswith(word)}), files


def _words(line: str) -> list[str]:
    """The words of a line whose last one may be unfinished; an empty one behind a space."""
    for end in ("", "'", '"'):
        try:
            words = shlex.split(line + end)
        except ValueError:
            continue
        return [*words, ""] if not end and re.search(r"(?<!\\)\s$", line) else words
    return []


def _command(word: str) -> str | None:
    return _PROGRAMS.get(word.rpartition("/")[2])


def _of_run(before: list[str], word: str) -> tuple[list[str], bool]:
    """Groups, choices and settings of a run, and the flags beside them."""
    from spikingbrain_train.config.compose import groups
    from spikingbrain_train.config.run import RunConfig

    last = before[-1] if before else ""
    if last in ("--cfg", "-c"):
        return list(_CFG), False
    if last == "--config":
        return [], True
    if word.startswith("-"):
        return [*_RUN_FLAGS, *(f"--{flag}" for flag in RANK_FLAGS)], False
    if last.removeprefix("--") in RANK_FLAGS or last == "--submit":
        return [], False
    sections = groups()
    name, equals, _ = word.partition("=")
    if equals and name in sections:
        return [f"{name}={choice}" for choice in sections[name]], False
    if equals:
        return _values(RunConfig, name)
    return [*(f"{group}=" for group in sections), *_names(RunConfig, word)], False


def _names(schema: Any, word: str) -> list[str]:
    """Settings as far as the next dot: ``opt`` gives ``optimizer.``, and that its settings."""
    from spikingbrain_train.config.schema import setting_types
    from spikingbrain_train.config.sections import with_sections

    depth = word.count(".")
    found = set()
    for name, _ in setting_types(with_sections(schema)):
        parts = name.split(".")
        if len(parts) > depth + 1:
            found.add(".".join(parts[: depth + 1]) + ".")
        elif len(parts) == depth + 1:
            found.add(f"{name}=")
    return [name for name in found if not (name.endswith("=") and f"{name[:-1]}." in found)]


def _values(schema: Any, name: str) -> tuple[list[str], bool]:
    """Values that a setting takes, where they can be listed; files for text."""
    from spikingbrain_train.config.schema import setting_types
    from spikingbrain_train.config.sections import with_sections

    annotation = dict(setting_types(with_sections(schema))).get(name)
    members = [annotation, *get_args(annotation)]
    values: list[str] = ["null"] if type(None) in members else []
    for member in members:
        if member is bool:
            values += ["true", "false"]
        elif isinstance(member, type) and issubclass(member, Enum):
            values += [choice.name for choice in member]
    return [f"{name}={value}" for value in values], str in members


def _of_parser(parser: argparse.ArgumentParser, before: list[str], word: str) -> tuple[list[str], bool]:
    """Flags, choices and sub-commands that argparse knows."""
    waiting, positional = None, 0
    for typed in before:
        action = parser._option_string_actions.get(typed.partition("=")[0])
        if action is not None:
            waiting = action if action.nargs != 0 and "=" not in typed else None
        elif typed.startswith("-"):
            waiting = None
        elif waiting is not None:
            if waiting.nargs not in ("+", "*"):
                waiting = None
        else:
            below = _positional(parser, positional)
            if isinstance(below, argparse._SubParsersAction):
                if typed not in below.choices:
                    return [], False
                return _of_parser(below.choices[typed], before[before.index(typed) + 1 :], word)
            positional += below is not None and below.nargs != "*"
    if word.startswith("-"):
        flag, equals, _ = word.partition("=")
        action = parser._option_string_actions.get(flag)
        if equals and action is not None:
            found, files = _of_action(action)
            return [f"{flag}={value}" for value in found], files
        return [flag for flag in parser._option_string_actions if flag.startswith("--")], False
    action = waiting if waiting is not None else _positional(parser, positional)
    return ([], False) if action is None else _of_action(action, before, word)


def _positional(parser: argparse.ArgumentParser, number: int) -> argparse.Action | None:
    positionals = [action for action in parser._actions if not action.option_strings]
    if not positionals:
        return None
    return positionals[min(number, len(positionals) - 1)]


def _of_action(action: argparse.Action, before: Iterable[str] = (), word: str = "") -> tuple[list[str], bool]:
    if action.choices is not None:
        return [str(getattr(choice, "value", choice)) for choice in action.choices], False
    special = _SPECIAL.get(action.dest)
    if special is not None and action.metavar != "NAME=VALUE":
        return special(list(before), word)
    if action.type in (int, float):
        return [], False
    return [], True


def _conversion(_before: list[str], _word: str) -> tuple[list[str], bool]:
    return _names_in("conversion"), True


def _pipeline(_before: list[str], _word: str) -> tuple[list[str], bool]:
    return _names_in("pipeline"), True


def _overrides(before: list[str], word: str) -> tuple[list[str], bool]:
    """Variables of the pipeline, or settings of a recipe."""
    if "--hf" in before:
        from spikingbrain_train.config.conversion import ConversionConfig

        return ([], False) if "=" in word else (_names(ConversionConfig, word), False)
    from spikingbrain_train.errors import SpikingBrainError
    from spikingbrain_train.pipelines.pipeline_file import load_pipeline

    named = next(
        (typed for typed in before if typed.endswith((".yaml", ".yml")) or typed in _names_in("pipeline")), ""
    )
    try:
        return [f"{name}=" for name in load_pipeline(named).variables], "=" in word
    except SpikingBrainError:
        return [], "=" in word


def _names_in(group: str) -> list[str]:
    from spikingbrain_train.config.yaml_files import conf_folder

    return [path.stem for path in (conf_folder() / group).glob("*.yaml")]


_SPECIAL: dict[str, Callable[[list[str], str], tuple[list[str], bool]]] = {
    "conversion": _conversion,
    "pipeline": _pipeline,
    "overrides": _overrides,
}
"""Arguments of which more is known than their parser says."""
