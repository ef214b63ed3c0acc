"""The Hydra side of a run: compose the config from the command line, or say in one sentence why not."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from spikingbrain_train.config.asked import Asked
from spikingbrain_train.config.groups import choices_of, groups
from spikingbrain_train.config.model_from_checkpoint import register_model_from_checkpoint, store_once
from spikingbrain_train.config.plugins import load_plugins, plugins_of_command_line
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.schema import explain, setting_types
from spikingbrain_train.config.sections import structured, with_sections
from spikingbrain_train.config.stored_config import stored_config_file, with_stored_config
from spikingbrain_train.config.yaml_files import conf_folder
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError

_OWN_FLAGS = "--config run_config.yaml, --help[=topic], --cfg job, --resolve, --info, --hydra-help"
# Files of Hydra's own about what no run uses, which take an eighth of the time to compose one.
_UNUSED = tuple(f"~hydra/{group}" for group in ("launcher", "sweeper", "help", "hydra_help", "output"))


def register_schema() -> None:
    """Tell Hydra what conf/config.yaml refers to: RunConfig as ``run_schema``, and the stored model.

    Calling it again changes nothing unless plugins have added sections.
    """
    store_once("run_schema", structured(with_sections(RunConfig)))
    register_model_from_checkpoint()


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def explain_composition(error: BaseException) -> SpikingBrainError | None:
    """The sentence for an error that Hydra raised while composing, or None for a foreign error."""
    if isinstance(error, OverrideParseException):
        return ConfigurationError(
            f"the override {error.override!r} cannot be read; write name=value, in shell quotes if it has "
            f"brackets, commas, spaces or $, e.g. 'data.train=[a,b]'"
        )
    if isinstance(error, MissingConfigException):
        # A choice that is a path has slashes of its own.
        group, _, choice = (error.missing_cfg_file or "").partition("/")
        choices = list(groups().get(group, {}))
        if choices:
            hint = _did_you_mean(choice, choices) or ";"
            return ConfigurationError(
                f"{group}={choice} does not exist{hint} {group} is one of {', '.join(choices)}"
            )
    text = str(error)
    no_group = re.match(r"Could not override '([^']*)'\. No match in the defaults list", text)
    if no_group:
        names = list(groups())
        if no_group[1] == "conversion":
            return ConfigurationError(
                "conversion is a part of spikingbrain-convert; a training run chooses from "
                + ", ".join(names)
            )
        return ConfigurationError(
            f"{no_group[1]} is not a group of this config; choose from {', '.join(names)}"
        )
    unknown = re.match(r"Could not override '([^'.]*)'\.", text)
    if unknown and unknown[1] not in dict(setting_types(with_sections(RunConfig))):
        hint = _did_you_mean(unknown[1], list(groups()))
        if hint:
            return ConfigurationError(f"{unknown[1]} is neither a group nor a setting{hint}")
    explained = explain(error, with_sections(RunConfig))
    if explained is not None:
        return explained
    # Hydra checks some arguments with plain ValueErrors.
    if isinstance(error, (HydraException, OmegaConfBaseException)) or _raised_in(error, "hydra"):
        return ConfigurationError(" ".join(text.split()))
    return None


def _raised_in(error: BaseException, package: str) -> bool:
    """Whether a function of ``package`` raised ``error``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).split(".")[0] == package


def check_choice(flag: str, name: str, group: str, *, but: Sequence[str] = (), also: str = "") -> None:
    """A name that a flag of a tool takes, and not an override, is a choice of a group.

    Args:
        flag: of the tool, for the sentence.
        name: behind it.
        group: a folder of conf/.
        but: choices that the tool can do nothing with.
        also: what else the flag takes, for the sentence.

    Raises:
        ConfigurationError: naming the flag and the choices.
    """
    known = [choice for choice in choices_of(group) if choice not in but]
    if name not in known:
        hint = _did_you_mean(name, known) or ";"
        more = f", or {also}" if also else ""
        raise ConfigurationError(
            f"{flag} {name} is no choice of conf/{group}{hint} choose one of {', '.join(known)}{more}"
        )


def check_choices(arguments: Sequence[str]) -> None:
    """Each group gets one choice, and Hydra's own settings none.

    Hydra would merge a list of choices, and with settings of its own run several times or write elsewhere.

    Raises:
        ConfigurationError: naming the group and its choices, or the setting.
    """
    known = groups()
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        name = name.lstrip("+~")
        if equals and re.split(r"[./]", name)[0] == "hydra" and name != "hydra.searchpath":
            raise ConfigurationError(f"{name} is a setting of Hydra itself, not of a run; leave it out")
        if name not in known:
            continue
        choices = ", ".join(known[name])
        if argument.startswith("~"):
            raise ConfigurationError(f"{argument} takes a group away; choose {name}=... from {choices}")
        try:
            value = OverridesParser.create().parse_override(argument).value()
        except HydraException:
            continue  # Hydra is about to say why
        if not isinstance(value, (str, dict)):
            hint = "; leave it out to have none" if name == "experiment" else ""
            raise ConfigurationError(f"{argument} does not fit: {name} takes one of {choices}{hint}")


@contextmanager
def _raised_errors() -> Iterator[None]:
    """Have Hydra raise its errors (else it prints several lines and exits 1), and make them one sentence."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except Exception as error:
        explained = explain_composition(error)
        if explained is None:
            raise
        raise explained from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def compose_from_command_line(further: Sequence[str] = ()) -> DictConfig | None:
    """Compose the run that ``sys.argv`` asks for.

    Args:
        further: arguments behind those of the command line; they win.

    Returns:
        The composed config with interpolations still in it, or None when the command line only asked to be
        shown something (``--help``, ``--cfg job`` ...), which is then already printed.

    Raises:
        ConfigurationError: a flag, group, choice, setting or value that does not exist or does not fit.
    """
    asked, given = Asked.of([*sys.argv[1:], *further])
    for argument in given:
        flag, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("--") or not equals:
            continue
        if flag.split(".")[0] in dict(setting_types(with_sections(RunConfig))):
            raise ConfigurationError(
                f"settings are written without dashes: {flag}={value}; flags are {_OWN_FLAGS}"
            )
    check_choices(given)
    load_plugins(plugins_of_command_line(given, stored_config_file(given)))
    register_schema()
    arguments = with_stored_config(given, groups())
    has_flags = any(argument.startswith("-") for argument in arguments)
    composed = _answer_flags(arguments) if has_flags else _compose(arguments)
    if composed is None:
        return None
    shown = asked.answer(composed)
    if shown is None:
        return composed
    print(shown)
    return None


def _compose(overrides: list[str]) -> DictConfig:
    named = any(each.lstrip("+~").startswith("hydra/") for each in overrides)
    with (
        _raised_errors(),
        hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())),
    ):
        return hydra.compose("config", overrides=[*overrides, *(() if named else _UNUSED)])


def _answer_flags(arguments: list[str]) -> DictConfig | None:
    """Let Hydra's own command line print what its flags ask for; it composes everything twice.

    Returns:
        The composed config where the flags asked for nothing that Hydra prints.
    """
    composed: list[DictConfig] = []
    task = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(
        composed.append
    )
    with _raised_errors(), _arguments(arguments):
        task()
    return composed[0] if composed else None


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """Hydra reads them from nowhere but sys.argv."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


def compose_run(overrides: list[str]) -> DictConfig:
    """Compose the run that ``spikingbrain-train`` with these arguments would get, interpolations still in it.

    Raises:
        ConfigurationError: as :func:`compose_from_command_line`.
    """
    check_choices(overrides)
    load_plugins(plugins_of_command_line(overrides))
    register_schema()
    return _compose(overrides)
