"""Scalars of a run, written to a JSON-lines file, TensorBoard and Weights & Biases.

Metric names are ``group/name``. The training loop writes ``train/loss``, ``train/learning_rate``,
``train/grad_norm``, ``train/tokens_per_second``, ``train/mfu`` (0-1), ``train/memory_gib`` and, on held-out
data, ``valid/cross_entropy`` (nats per token). Models with experts add ``moe/...`` (see
:mod:`~spikingbrain_train.training.expert_load`).
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from spikingbrain_train.config.run import LoggingConfig, WandbMode
from spikingbrain_train.errors import DataError, PlatformError
from spikingbrain_train.storage.durable_files import write_text_durably
from spikingbrain_train.training.heat_map import HeatMap

METRICS_FILE = "metrics.jsonl"
WANDB_RUN_ID_FILE = "wandb_run_id.txt"

_log = logging.getLogger(__name__)


class MetricsLogger:
    """Writes scalars to every place that the config asks for; does nothing on ranks that do not log.

    A run that resumes from iteration N drops the points that an earlier attempt wrote beyond N, so that its
    file and its TensorBoard curve have one point per iteration. W&B cannot delete points: there the same run
    (its id is kept in ``wandb_run_id.txt``) goes on, and the later attempt's points are drawn over the
    earlier one's.
    """

    def __init__(
        self,
        config: LoggingConfig,
        output_dir: str | Path,
        *,
        is_logging_rank: bool,
        resumed_iteration: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the sinks.

        Args:
            config: which sinks, and their names.
            output_dir: folder of the run; made if missing.
            is_logging_rank: True on the one rank that knows the loss and reports it. The others never touch
                a file.
            resumed_iteration: last iteration that the loaded checkpoint contains; 0 for a new run, which
                starts the metrics afresh.
            run_config: the resolved config, shown by W&B beside the curves.

        Raises:
            PlatformError: ``output_dir`` cannot be written, or W&B cannot start as asked.
        """
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self.path = Path(output_dir) / METRICS_FILE
        if not is_logging_rank:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_points_after(self.path, resumed_iteration)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if config.tensorboard:
            # Imported here because it costs a second or two, on one rank only.
            from torch.utils.tensorboard import SummaryWriter

            first = resumed_iteration + 1 if resumed_iteration else 0
            self._tensorboard = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=first)
        if config.wandb is not WandbMode.disabled:
            self._wandb = _start_wandb(config, self.path.parent, run_config, new_run=resumed_iteration == 0)

    def log(
        self,
        iteration: int,
        metrics: Mapping[str, float],
        heat_maps: Mapping[str, HeatMap] | None = None,
    ) -> None:
        """Write one point: the state after ``iteration`` optimizer steps.

        Args:
            iteration: steps done so far; 0 is before the first.
            metrics: name -> Python number. In the file a NaN or infinity becomes ``null``, which any JSON
                reader takes.
            heat_maps: name -> table; rows of numbers in the file, pictures elsewhere.

        Raises:
            PlatformError: the metrics file cannot be written, for example because the disk is full.
        """
        if self._file is None:
            return
        heat_maps = heat_maps or {}
        point: dict[str, Any] = {"iteration": iteration, "time": round(time.time(), 3)}
        point.update({name: _finite(value) for name, value in metrics.items()})
        for name, table in heat_maps.items():
            point[name] = [[_finite(value, digits=4) for value in row] for row in table.rows]
        try:
            self._file.write(json.dumps(point) + "\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, iteration)
            for name, table in heat_maps.items():
                self._tensorboard.add_figure(name, table.draw(), iteration)
        if self._wandb is not None:
            from wandb import Image

            pictures = {name: Image(table.draw()) for name, table in heat_maps.items()}
            self._wandb.log({"iteration": iteration, **metrics, **pictures})

    def close(self) -> None:
        """Flush and close every sink; may be called twice."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()  # tries once more what a full disk kept from being written
            except OSError as error:
                raise _cannot_write(self.path, error) from error
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except PlatformError as failure:
            if error is None:
                raise
            _log.warning("%s", failure)  # what ends the run is the error that is under way


def _finite(value: float, digits: int | None = None) -> float | None:
    if not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The points of a run's metrics file, in the order they were written.

    A last line that a crash cut short is left out.

    Raises:
        DataError: there is no metrics file, or a line inside it is not a JSON object with an iteration.
    """
    path = Path(output_dir) / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; name the output_dir of a run that has logged metrics."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    *complete, _unfinished = lines
    points = []
    for number, line in enumerate(complete, start=1):
        point = _parse(line)
        if point is None:
            raise DataError(f"{path}, line {number} is not a metrics point; remove that line.")
        points.append(point)
    return points


def _parse(line: str) -> dict[str, Any] | None:
    try:
        point = json.loads(line)
    except ValueError:
        return None
    return point if isinstance(point, dict) and isinstance(point.get("iteration"), int) else None


def _drop_points_after(path: Path, iteration: int) -> None:
    """Keep the points up to ``iteration`` (none for a new run) and drop lines that a crash damaged."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        point = _parse(line)
        if point is None:
            # A damaged log line is no reason to refuse to go on training.
            _log.warning("%s, line %d is not a metrics point; it is dropped", path, number)
        elif iteration > 0 and point["iteration"] <= iteration:
            kept.append(line + "\n")
    write_text_durably(path, "".join(kept))


def _start_wandb(
    config: LoggingConfig, output_dir: Path, run_config: Mapping[str, Any] | None, *, new_run: bool
) -> Any:
    """Open the W&B run that belongs to ``output_dir``, making its id if this run is new."""
    import wandb

    id_file = output_dir / WANDB_RUN_ID_FILE
    if new_run or not id_file.exists():
        id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name,
            id=id_file.read_text(encoding="utf-8").strip(),
            dir=str(output_dir),
            mode=config.wandb.value,
            # Offline runs with one id are joined by `wandb sync`; the option means nothing there and only
            # warns.
            resume="allow" if config.wandb is WandbMode.online else None,
            config=dict(run_config or {}),
            settings=wandb.Settings(quiet=True),
        )
    except wandb.Error as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlatformError(
            f"Weights & Biases cannot start ({reason}); run `wandb login`, or set logging.wandb=offline."
        ) from error
    # Our own x axis: W&B refuses steps that go backwards, which a resumed run's do.
    run.define_metric("iteration")
    run.define_metric("*", step_metric="iteration")
    return run


def _cannot_write(path: Path, error: OSError) -> PlatformError:
    return PlatformError(
        f"{path} cannot be written ({error.strerror}); choose another output_dir or make room there."
    )
