"""Callbacks of other packages, which ``callbacks`` names. Needs no torch but theirs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from spikingbrain_train.config.named_class import named_classes
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.training.callbacks.callback import Callback

HOOKS: dict[str, Callable] = {
    name: value for name, value in vars(Callback).items() if inspect.isfunction(value)
}


def check_callbacks(config: RunConfig) -> None:
    """Import the classes that ``callbacks`` names, and hold them to what a callback is.

    Raises:
        ConfigurationError: one cannot be imported, is no callback, takes other settings, or has a method that
            is no hook.
    """
    for named in named_classes("callbacks", config.callbacks):
        _check_hooks(named.path, named.load(Callback))


def outside_callbacks(config: RunConfig) -> list[Callback]:
    """One object of each class that ``callbacks`` names. Raises as :func:`check_callbacks` does."""
    check_callbacks(config)
    return [named.make(Callback) for named in named_classes("callbacks", config.callbacks)]


def _check_hooks(path: str, kind: type[Callback]) -> None:
    own = [each for each in kind.__mro__ if issubclass(each, Callback) and each is not Callback]
    methods = {name: value for each in own for name, value in vars(each).items() if inspect.isfunction(value)}
    for name, method in methods.items():
        if name in HOOKS:
            expected = len(inspect.signature(HOOKS[name]).parameters)
            try:
                inspect.signature(method).bind(*[None] * expected)
            except TypeError:
                takes = ", ".join(inspect.signature(HOOKS[name]).parameters)
                require(False, f"callbacks names {path}, whose {name} does not take ({takes})")
        elif not name.startswith("_"):
            near = difflib.get_close_matches(name, HOOKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"hooks are {', '.join(HOOKS)};"
            require(
                False,
                f"callbacks names {path}, whose method {name} is no hook; {hint} The name of a helper begins "
                "with an underscore",
            )
