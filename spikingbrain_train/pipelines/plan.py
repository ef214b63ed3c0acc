"""From a pipeline's YAML to its steps: everything is looked up and checked before anything runs."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spikingbrain_train.config.plugins import load_plugins
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError
from spikingbrain_train.pipelines.kinds import STEP_KINDS, Context, StepKind
from spikingbrain_train.pipelines.pipeline_file import CHECKOUT, PipelineFile, WhenChanged, checkout
from spikingbrain_train.pipelines.references import did_you_mean, in_order, references, resolve, step_of
from spikingbrain_train.pipelines.steps import Step


@dataclass(frozen=True)
class Pipeline:
    """Steps in the order in which they run."""

    path: str
    output: Path
    """Folder of the state and, if the steps do not say otherwise, of everything that they make."""
    steps: list[Step]
    """Those that have something to do."""
    when_changed: WhenChanged
    show: Path | None
    """A text file whose content is printed at the end."""
    lacking: list[str]
    """What a run needs and is not there, a sentence each."""


def plan_pipeline(
    file: PipelineFile, is_done: Callable[[Step], bool], *, incomplete: bool = False
) -> Pipeline:
    """Look every reference up, make the steps, and check them.

    Args:
        file: the pipeline.
        is_done: whether a step is finished; what it has found out then takes the place of what is assumed.
        incomplete: go on without the variables and files that are missing, and list them in ``lacking``.

    Raises:
        SpikingBrainError: naming the file, and the step where there is one.
    """
    order = in_order_of_need(file)
    kinds = _kinds(file)
    missing = file.missing()
    if missing and not incomplete:
        raise ConfigurationError(_no_value(file, missing))
    unknown = frozenset(_placeholder(name) for name in missing)
    variables = resolved_variables(file)
    output = Path(str(variables["output"]))
    if (root := checkout()) is not None:
        variables[CHECKOUT] = str(root)
    planned: dict[str, Step] = {}
    values: dict[str, Mapping[str, Any]] = {}
    for name in order:
        needs: dict[str, str] = {}

        def look_up(reference: str, needs: dict[str, str] = needs) -> Any:
            referred = step_of(reference)
            if referred is None:
                if reference not in variables:
                    raise ConfigurationError(
                        f"${{{CHECKOUT}}} is known in a checkout only, and this is an installed package; "
                        "name its commands instead, e.g. command: [spikingbrain-plot, ...]"
                    )
                return variables[reference]
            step, wanted = referred
            if wanted in planned[step].outputs:
                needs[step] = planned[step].key
                return planned[step].outputs[wanted]
            if wanted in values[step]:
                return values[step][wanted]
            known = [*planned[step].outputs, *values[step]]
            raise ConfigurationError(
                f"${{{reference}}} is not an output of {step}{did_you_mean(wanted, known) or ';'} it has "
                f"{', '.join(known)}"
            )

        with _named(file.path, name):
            given = {key: resolve(value, look_up) for key, value in file.steps[name].items()}
            context = Context(name, output, planned, unknown)
            kinds[name].check(given)
            step = kinds[name].plan(context, given)
            title, sbatch = str(given.get("title") or step.title), _sbatch_options(given.get("sbatch"))
            step = replace(step, title=title, sbatch=sbatch, needs=needs)
            planned[name] = step
            values[name] = step.read_values() if step.values and is_done(step) else step.assumed
    lacking = [_no_value(file, missing)] if missing else []
    lacking += _missing_files(file, planned, unknown)
    if lacking and not incomplete:
        raise ConfigurationError(lacking[0])
    _check_makes(file, planned)
    show = _shown(file, planned)
    steps = [step for step in planned.values() if step.command]
    return Pipeline(file.path, output, steps, file.when_changed, show, lacking)


def _sbatch_options(given: Any) -> list[str]:
    """Raises ConfigurationError where they are no list of options."""
    options = [] if given is None else given
    if not isinstance(options, list) or not all(str(word).startswith("-") for word in options):
        raise ConfigurationError(
            f"sbatch={given} must be a list of its options, e.g. [--gpus-per-node=1, --time=02:00:00]"
        )
    return [str(word) for word in options]


def in_order_of_need(file: PipelineFile) -> list[str]:
    """The names of the steps, each behind those that it refers to.

    Raises:
        ConfigurationError: a reference to what is not there, or steps that wait for each other.
    """
    needs: dict[str, list[str]] = {}
    for name, settings in file.steps.items():
        needs[name] = []
        for reference in references(settings):
            referred = step_of(reference)
            known = [*file.variables, CHECKOUT] if referred is None else list(file.steps)
            wanted = reference if referred is None else referred[0]
            if wanted not in known:
                what = "variable" if referred is None else "step"
                raise ConfigurationError(
                    f"{file.path}, step {name}: ${{{reference}}} refers to a {what} that is not there"
                    f"{did_you_mean(wanted, known) or ';'} there are {', '.join(known)}"
                )
            if referred is not None:
                needs[name].append(referred[0])
    with _named(file.path):
        return in_order(needs)


def _kinds(file: PipelineFile) -> dict[str, StepKind]:
    """The kind of every step, which knows all of its settings."""
    with _named(file.path):
        load_plugins(file.plugins)
    kinds = {}
    for name, settings in file.steps.items():
        with _named(file.path, name):
            kind = settings.get("kind")
            if not isinstance(kind, str):
                raise ConfigurationError(f"kind={kind} does not fit: every step has one, e.g. kind: train")
            kinds[name] = STEP_KINDS[kind]
            kinds[name].check(settings)
    return kinds


def _placeholder(variable: str) -> str:
    """What stands for a variable that has no value yet."""
    return f"<{variable}>"


def resolved_variables(file: PipelineFile) -> dict[str, Any]:
    """The variables of a pipeline, with their references to each other looked up.

    Raises:
        ConfigurationError: one refers to what is not there, or they refer to each other in a circle.
    """
    missing = file.missing()
    variables = {
        name: _placeholder(name) if name in missing else value for name, value in file.variables.items()
    }
    resolved: dict[str, Any] = {}
    with _named(file.path):
        needs = {}
        for name, value in variables.items():
            needs[name] = list(references(value))
            for wanted in needs[name]:
                if wanted not in variables:
                    raise ConfigurationError(
                        f"{name} refers to ${{{wanted}}}, which is not there{did_you_mean(wanted, variables)}"
                    )
        for name in in_order(needs):
            resolved[name] = resolve(variables[name], resolved.__getitem__)
    return resolved


def _missing_files(file: PipelineFile, planned: Mapping[str, Step], unknown: frozenset[str]) -> list[str]:
    """A sentence for every program and file that is neither here nor made by a step."""
    programs: dict[str, list[str]] = {}
    readers: dict[str, list[str]] = {}
    for name, step in planned.items():
        if not step.command:
            continue
        if shutil.which(step.command[0]) is None:
            programs.setdefault(step.command[0], []).append(name)
        for setting, path in step.reads.items():
            if any(word in path for word in unknown):
                continue
            maker = _maker(planned, name, path)
            if maker is not None:
                if maker.name not in _all_needs(planned, step):
                    outputs = ", ".join(f"${{steps.{maker.name}.{output}}}" for output in maker.outputs)
                    raise ConfigurationError(
                        f"{file.path}, step {name}: {setting}={path} is made by the step {maker.name}; refer "
                        f"to it as {outputs}"
                    )
            elif not glob.glob(path, recursive=True) and not Path(path).exists():
                readers.setdefault(path, []).append(f"{name} ({setting})")
    return [
        *(
            f"{file.path}, step {', '.join(names)}: the program {program} is not installed here"
            for program, names in programs.items()
        ),
        *(
            f"{file.path}, step {', '.join(names)}: {path} does not exist; correct it, or refer to the step "
            "that makes it"
            for path, names in readers.items()
        ),
    ]


def _maker(planned: Mapping[str, Step], reader: str, path: str) -> Step | None:
    others = {name: step for name, step in planned.items() if name != reader}
    return Context(reader, Path(), others).maker(path)


def _all_needs(planned: Mapping[str, Step], step: Step) -> set[str]:
    """The steps that ``step`` builds on, directly or not."""
    found: set[str] = set()
    waiting = list(step.needs)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += planned[name].needs
    return found


def _check_makes(file: PipelineFile, planned: Mapping[str, Step]) -> None:
    """No step makes what another one makes or would clear away."""
    owners: dict[Path, str] = {}
    for name, step in planned.items():
        for path in step.makes:
            for other, owner in owners.items():
                if owner != name and (path == other or path in other.parents or other in path.parents):
                    raise ConfigurationError(
                        f"{file.path}, step {name}: {path} lies in the way of the step {owner}, which makes "
                        f"{other}; give one of them another path"
                    )
        owners.update(dict.fromkeys(step.makes, name))


def _shown(file: PipelineFile, planned: Mapping[str, Step]) -> Path | None:
    if file.show is None:
        return None

    def look_up(reference: str) -> Any:
        step, output = step_of(reference) or ("", reference)
        if step not in planned or output not in planned[step].outputs:
            raise ConfigurationError(
                f"show refers to ${{{reference}}}, which is not there; write ${{steps.<step>.<output>}}"
            )
        return planned[step].outputs[output]

    with _named(file.path):
        return Path(str(resolve(file.show, look_up)))


def _no_value(file: PipelineFile, missing: list[str]) -> str:
    verb = "has" if len(missing) == 1 else "have"
    give = " ".join(f"{name}=..." for name in missing)
    return f"{file.path}: {', '.join(missing)} {verb} no value; give {give} on the command line"


@contextmanager
def _named(path: str, step: str | None = None) -> Iterator[None]:
    """Put the file, and the step, in front of the sentence of an error."""
    try:
        yield
    except SpikingBrainError as error:
        where = path if step is None else f"{path}, step {step}"
        raise type(error)(f"{where}: {error}") from error
