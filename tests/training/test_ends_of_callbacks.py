"""Whatever ends a run, callbacks that have begun are closed, and the first error is what the user sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.callbacks.callbacks import Callbacks


class First(Callback):
    def start(self) -> None:
        self.ends: list[BaseException | None] = []

    def end(self, error: BaseException | None) -> None:
        self.ends.append(error)


class Second(First):
    def start(self) -> None:
        raise OSError("no account")


class Third(First):
    """Ends what it has begun, as anybody would write it."""


def test_callbacks_behind_one_that_cannot_start_do_not_end() -> None:
    first, third = First(), Third()
    run: Any = SimpleNamespace()
    callbacks = Callbacks([first, Second(), third], run)
    with pytest.raises(OSError, match="no account") as error:
        callbacks.start()
    callbacks.end(error.value)
    assert first.ends == [error.value]
    assert not hasattr(third, "ends")


def test_every_one_ends_once_although_another_fails_at_it() -> None:
    class Fails(Callback):
        def end(self, error: BaseException | None) -> None:
            raise OSError("full")

    first = First()
    callbacks = Callbacks([first, Fails()], SimpleNamespace())  # type: ignore[arg-type]
    callbacks.start()
    with pytest.raises(OSError, match="full"):
        callbacks.end(None)
    callbacks.end(None)
    assert len(first.ends) == 1
