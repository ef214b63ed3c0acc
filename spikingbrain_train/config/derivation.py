"""``derivation.json``: what a folder was made from, where no run and no import made it.

Beside the weights of a checkpoint that was laid out anew or averaged. Where it came from and what it has read
are written down in full, because its sources may be gone tomorrow. Without torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spikingbrain_train.config.run_record import StageTokens, TokenHistory
from spikingbrain_train.errors import CheckpointError

DERIVATION_FILE = "derivation.json"


@dataclass(frozen=True)
class Derivation:
    """How a folder was made of others."""

    did: str
    """In words: ``laid out for TP 2 x PP 2``, ``average of 3 checkpoints``."""
    sources: list[str]
    """The folders that it was made from."""
    history: TokenHistory
    """What its weights have read; of several sources, that of the one that has read most."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """The way back of that source, a folder an entry, the first of them the source itself."""
    weights: list[float] | None = None
    """Share of each source in an average."""
    layout: dict[str, int] | None = None
    """Degrees of parallelism that the shards are laid out for."""

    def write(self, folder: Path) -> None:
        """Put it into a folder that is being written."""
        text = json.dumps(asdict(self), indent=2)
        (folder / DERIVATION_FILE).write_text(text + "\n", encoding="utf-8")


def read_derivation(folder: Path) -> Derivation | None:
    """What a folder says it was made from; None where a run, an import or an export made it.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / DERIVATION_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        history = fields.pop("history")
        stages = [StageTokens(**stage) for stage in history["stages"]]
        of_tokens = TokenHistory(stages, history["unknown"], history["source_tokens"])
        return Derivation(history=of_tokens, **fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not say what the folder was made from ({error or type(error).__name__}); copy the "
            "folder again"
        ) from error
