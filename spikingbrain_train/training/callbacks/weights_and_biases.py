"""A run's curves in Weights & Biases."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spikingbrain_train.config.run import WandbMode
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report

WANDB_RUN_ID_FILE = "wandb_run_id.txt"


class WeightsAndBiases(Callback):
    """Sends reports, the config and what the run is (``run``) where ``logging.wandb`` asks for it.

    Where a run goes on, its summary says from which iteration and with which changes.

    W&B cannot delete points: a run that goes on continues under its id, which is kept in
    ``wandb_run_id.txt``, and its points are drawn over those of an earlier attempt.
    """

    _wandb: Any = None

    def start(self) -> None:
        """Open the W&B run that belongs to output_dir, under a new id if this run is new.

        Raises:
            PlatformError: it cannot start as asked.
        """
        config = self.run.config
        if config.logging.wandb is WandbMode.disabled or not self.run.groups.is_main_process:
            return
        import wandb

        id_file = Path(config.output_dir) / WANDB_RUN_ID_FILE
        if self.run.state.iteration == 0 or not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        is_online = config.logging.wandb is WandbMode.online
        beginning = self.run.beginning.event()
        shown: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
        try:
            self._wandb = wandb.init(
                project=config.logging.wandb_project,
                name=config.logging.wandb_name,
                id=id_file.read_text(encoding="utf-8").strip(),
                dir=config.output_dir,
                mode=config.logging.wandb.value,
                # Offline runs with one id are joined by `wandb sync`; the option means nothing there and only
                # warns.
                resume="allow" if is_online else None,
                config=shown | {"run": beginning["run"]},
                settings=wandb.Settings(quiet=True),
            )
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PlatformError(
                f"Weights & Biases cannot start ({reason}); run `wandb login`, or set logging.wandb=offline."
            ) from error
        # Our own x axis: W&B refuses steps that go backwards, which a resumed run's do.
        self._wandb.define_metric("iteration")
        self._wandb.define_metric("*", step_metric="iteration")
        if "changed" in beginning and not self.run.is_last_step:
            changed = {name: f"{was} -> {now}" for name, (was, now) in beginning["changed"].items()}
            self._wandb.summary.update(
                {"resumed/iteration": beginning["iteration"], "resumed/changed": changed}
            )

    def log(self, report: Report) -> None:
        if self._wandb is None:
            return
        from wandb import Image

        pictures = {name: Image(table.draw()) for name, table in report.heat_maps.items()}
        self._wandb.log({"iteration": report.iteration, **report.metrics, **pictures})

    def end(self, error: BaseException | None) -> None:
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
