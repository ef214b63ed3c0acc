"""What the tests of bricks share: a small model in several forms, and the command on ranks."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.small_source import save_small_source


def bricks(*arguments: str) -> None:
    """The command, on every rank of a pool."""
    from spikingbrain_train.bricks.command_line import bricks

    bricks([*arguments, "--device", "cpu", "--dtype", "float32"])


def save_models(folder: Path) -> None:
    """A dense ``source``, a hybrid with ``experts``, the ``export`` of that, and a ``text.txt``."""
    source = save_small_source(folder / "source")
    recipe = ConversionConfig(
        mixers=["gla", "swa"],
        sliding_window=7,
        feed_forwards=["dense", "moe"],
        moe=MoEConfig(num_experts=4, router_topk=2, num_shared_experts=1),
    )
    import_checkpoint(source, folder / "experts", recipe)
    export_checkpoint(folder / "experts", folder / "export")
    (folder / "text.txt").write_text(topics["assignment"])
