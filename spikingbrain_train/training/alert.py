"""What somebody should know who does not watch a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How much it matters; W&B has the same three."""

    info = "info"
    warning = "warning"
    error = "error"


@dataclass(frozen=True)
class Alert:
    """Sent by ``run.callbacks.alert(...)``; the log says the same where it is worth a line there."""

    title: str
    """The same for all of a kind: "slow rank"."""
    text: str
    """One sentence."""
    level: Level = Level.warning
