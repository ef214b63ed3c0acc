"""The kinds of steps that a pipeline can have, by the name that its YAML calls them.

A kind from elsewhere is registered by a module that the pipeline names in ``plugins``.
"""

from __future__ import annotations

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.pipelines.kinds.command import Command
from spikingbrain_train.pipelines.kinds.kind import Context, StepKind
from spikingbrain_train.pipelines.kinds.tools import Convert, Evaluate, Export, Generate, Preprocess
from spikingbrain_train.pipelines.kinds.train import Train
from spikingbrain_train.pipelines.references import did_you_mean

__all__ = ["STEP_KINDS", "Context", "StepKind", "kind_named", "register"]

STEP_KINDS: dict[str, StepKind] = {
    "preprocess": Preprocess(),
    "convert": Convert(),
    "train": Train(),
    "evaluate": Evaluate(),
    "export": Export(),
    "generate": Generate(),
    "command": Command(),
}


def register(name: str, kind: StepKind) -> None:
    """Make ``kind: <name>`` known. Registering the same class again changes nothing.

    Raises:
        ConfigurationError: another kind has the name.
    """
    if type(STEP_KINDS.setdefault(name, kind)) is not type(kind):
        raise ConfigurationError(f"there is a kind of step called {name} already; choose another name")


def kind_named(name: object) -> StepKind:
    """The kind that a YAML names.

    Raises:
        ConfigurationError: there is none; names those that there are.
    """
    kind = STEP_KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        hint = did_you_mean(str(name), STEP_KINDS)
        raise ConfigurationError(f"kind {name} does not exist{hint or ';'} there are {', '.join(STEP_KINDS)}")
    return kind
