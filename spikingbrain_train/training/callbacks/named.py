"""Callbacks and evaluators that a run names, before there is a run. Needs no torch but theirs."""

from __future__ import annotations

from collections.abc import Callable

from spikingbrain_train.config.named_class import NamedClass, named_classes
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.training.callbacks.outside import check_callbacks


def named_evaluators(config: RunConfig) -> list[NamedClass]:
    """The classes of ``logging.evaluators``, none of them imported."""
    return named_classes("logging.evaluators", config.logging.evaluators)


def check_named_classes(config: RunConfig, is_made_later: Callable[[str], bool] = lambda path: False) -> None:
    """What the config names by import path is there and is what it has to be.

    Args:
        config: the run.
        is_made_later: whether a path that an evaluator is given is not there yet, but will be.

    Raises:
        ConfigurationError: ``callbacks`` or ``logging.evaluators`` names something that is none.
    """
    check_callbacks(config)
    if not config.logging.evaluators:
        return
    from spikingbrain_train.evaluation.evaluator import Evaluator  # it imports torch, as they do

    for named in named_evaluators(config):
        if any(isinstance(each, str) and is_made_later(each) for each in named.settings.values()):
            named.load(Evaluator)  # type: ignore[type-abstract]
        else:
            named.make(Evaluator)  # type: ignore[type-abstract]
