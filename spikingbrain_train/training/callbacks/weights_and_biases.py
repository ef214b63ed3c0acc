"""A run's curves in Weights & Biases."""

from __future__ import annotations

import secrets
import socket
import urllib.parse
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spikingbrain_train.config.run import WandbMode
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.runtime.git_state import git_state
from spikingbrain_train.training.alert import Alert, Level
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report

WANDB_RUN_ID_FILE = "wandb_run_id.txt"
_REACH_SECONDS = 5.0
_INIT_SECONDS = 30.0
"""W&B's own patience at the start is 90 s, and at the end without limit."""
_FINISH_SECONDS = 60.0
_LEVELS = {Level.info: "INFO", Level.warning: "WARN", Level.error: "ERROR"}


class WeightsAndBiases(Callback):
    """Sends reports, alerts, the config and what the run is where ``logging.wandb`` asks for it.

    In the config stand, beside the settings, ``run`` (docs/metrics.md), ``git`` (the code's commit) and
    ``lineage`` (the stages before). Where a run goes on, its summary says from which iteration and with which
    changes. What cannot be reached is no reason not to train: the run is written to output_dir then, and a
    warning says how to upload it later.

    W&B cannot delete points: a run that goes on continues under its id, which is kept in
    ``wandb_run_id.txt``, and its points are drawn over those of an earlier attempt.
    """

    _wandb: Any = None
    _start_is_told = False

    def start(self) -> None:
        """Open the W&B run that belongs to output_dir, under a new id if this run is new.

        Raises:
            PlatformError: it cannot start as asked: there is no account, or the settings are none of W&B's.
        """
        config = self.run.config
        if config.logging.wandb is WandbMode.disabled or not self.run.groups.is_main_process:
            return
        with self.run.activity("opening Weights & Biases"):
            self._open(config.logging.wandb)
        # Our own x axis: W&B refuses steps that go backwards, which a resumed run's do.
        self._wandb.define_metric("iteration")
        self._wandb.define_metric("*", step_metric="iteration")
        beginning = self.run.beginning.event()
        if "changed" in beginning and not self.run.is_last_step:
            changed = {name: f"{was} -> {now}" for name, (was, now) in beginning["changed"].items()}
            self._wandb.summary.update(
                {"resumed/iteration": beginning["iteration"], "resumed/changed": changed}
            )

    def _open(self, mode: WandbMode) -> None:
        import wandb

        if mode is WandbMode.online and (reason := _unreachable(wandb.setup().settings.base_url)):
            mode = self._offline_instead(reason)
        try:
            self._wandb = self._init(mode)
        except wandb.Error as error:
            # A wrong key is one of the network's errors to W&B, and the user's to put right.
            is_of_user = isinstance(error, wandb.errors.AuthenticationError)
            if is_of_user or not isinstance(error, wandb.errors.CommError):
                raise _cannot_start(error) from error
            self._wandb = self._init(self._offline_instead(_first_line(error)))

    def _init(self, mode: WandbMode) -> Any:
        import wandb

        config = self.run.config
        id_file = Path(config.output_dir) / WANDB_RUN_ID_FILE
        if self.run.state.iteration == 0 or not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        settings: dict[str, Any] = {"quiet": True, "init_timeout": _INIT_SECONDS}
        if "finish_timeout" in wandb.Settings.model_fields:
            settings |= {"finish_timeout": _FINISH_SECONDS, "finish_timeout_raises": True}
        return wandb.init(
            project=config.logging.wandb_project,
            name=config.logging.wandb_name,
            id=id_file.read_text(encoding="utf-8").strip(),
            dir=config.output_dir,
            mode=mode.value,
            # Offline runs with one id are joined by `wandb sync`; the option means nothing there and only
            # warns.
            resume="allow" if mode is WandbMode.online else None,
            config=self._config(),
            settings=wandb.Settings(**settings),
        )

    def _config(self) -> dict[str, Any]:
        run, code = self.run, git_state()
        shown: Any = OmegaConf.to_container(OmegaConf.structured(run.config), enum_to_str=True)
        history = run.record.history
        return shown | {
            "run": run.beginning.event()["run"],
            "git": None if code is None else asdict(code),
            "lineage": [] if history is None else [asdict(stage) for stage in history.stages],
        }

    def _offline_instead(self, reason: str) -> WandbMode:
        folder = Path(self.run.config.output_dir) / "wandb" / "offline-run-*"
        self.run.say(
            f"warning: Weights & Biases cannot be reached ({reason}), so the run goes on with "
            f"logging.wandb=offline; upload it later by: wandb sync {folder}"
        )
        return WandbMode.offline

    def log(self, report: Report) -> None:
        if self._wandb is None:
            return
        from wandb import Image

        pictures = {name: Image(table.draw()) for name, table in report.heat_maps.items()}
        self._wandb.log({"iteration": report.iteration, **report.metrics, **pictures})
        times = self.run.console.start_times
        if times.total is not None and not self._start_is_told:
            self._start_is_told = True
            parts = {f"start/{name}": round(seconds, 2) for name, seconds in times.parts.items()}
            self._wandb.summary.update(parts)

    def alert(self, alert: Alert) -> None:
        if self._wandb is not None:
            self._wandb.alert(alert.title, alert.text, _LEVELS[alert.level])

    def end(self, error: BaseException | None) -> None:
        if self._wandb is None:
            return
        opened, self._wandb = self._wandb, None
        try:
            opened.finish(exit_code=0 if error is None else 1)
        except TimeoutError:
            self.run.say(
                f"warning: Weights & Biases has not taken all of the run within {_FINISH_SECONDS:g} s; "
                f"upload the rest later by: wandb sync {Path(opened.dir).parent}"
            )


def _cannot_start(error: Exception) -> PlatformError:
    return PlatformError(
        f"Weights & Biases cannot start ({_first_line(error)}); run `wandb login`, or set "
        "logging.wandb=offline."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _unreachable(url: str) -> str | None:
    """Why nobody answers at the address, after some seconds at most; None where somebody does.

    Behind a proxy nothing but W&B's own attempt tells.
    """
    address = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    if address.hostname is None or address.scheme in proxies or "all" in proxies:
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), _REACH_SECONDS).close()
    except OSError as error:
        return f"{url}: {error.strerror or error}"
    return None
