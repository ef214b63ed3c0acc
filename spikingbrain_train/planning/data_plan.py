"""What a run reads: how large each of its datasets is, and how often it is read. Pure Python: no torch.

Only heads of files are read, so a plan of terabytes takes no longer. A dataset that is not here is no error:
a plan may be made where the data is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import blend_shares
from spikingbrain_train.errors import DataError
from spikingbrain_train.planning.file_checks import check_prefix
from spikingbrain_train.storage.index_format import DatasetSize, dataset_size

AS_GOOD_AS_FRESH, WORTH_LITTLE = 4, 16
"""Epochs up to which repeated tokens are nearly as good as fresh ones, and beyond which they add little.

Their worth decays with a constant of about 15 repetitions. Measured in pretraining from scratch, see
Muennighoff et al., Scaling Data-Constrained Language Models, arXiv 2305.16264."""
_SOURCE = "Muennighoff et al., arXiv 2305.16264"


@dataclass(frozen=True)
class TrainSource:
    """A dataset of data.train."""

    setting: str
    """``data.train[0]``."""
    prefix: str
    size: DatasetSize | None
    """None where it cannot be read."""
    problem: str | None
    """The sentence that says why."""
    share: float | None
    """Of the samples; None where the blend is by size and one size is not known."""
    epochs: float | None
    """How often the stage reads it; None where that is not known, or it is shorter than a sequence."""


@dataclass(frozen=True)
class ValidSource:
    """A dataset of data.valid."""

    setting: str
    prefix: str
    size: DatasetSize | None
    problem: str | None
    windows: int
    """Sequences that it is cut into, the last of which is padded."""
    read: int
    """How many of them an evaluation reads."""


@dataclass(frozen=True)
class DataPlan:
    """All datasets of a run."""

    config: RunConfig
    train: list[TrainSource]
    valid: list[ValidSource]

    def warnings(self) -> list[str]:
        """A sentence for everything that a user ought to look at."""
        problems = [source.problem for source in self.train] + [source.problem for source in self.valid]
        found = [problem for problem in problems if problem is not None]
        return [*found, *self._too_short(), *self._repeated(), *self._held_out()]

    def _too_short(self) -> Iterator[str]:
        length = self.config.stage.seq_length
        for source in self.train:
            if source.size is not None and source.size.tokens <= length:
                yield (
                    f"{source.setting}={source.prefix} has {source.size.tokens:,} tokens, but one sample "
                    f"needs {length + 1:,} (stage.seq_length + 1): a run will refuse it; add text, or leave "
                    "it out"
                )

    def _repeated(self) -> Iterator[str]:
        read = [(source.epochs, source) for source in self.train if source.epochs is not None]
        for least, most, words in (
            (WORTH_LITTLE, float("inf"), f"beyond about {WORTH_LITTLE} epochs, repeated tokens add little"),
            (
                AS_GOOD_AS_FRESH,
                WORTH_LITTLE,
                f"up to about {AS_GOOD_AS_FRESH} epochs are nearly as good as fresh tokens, later ones less "
                "and less",
            ),
        ):
            found = sorted(
                ((epochs, source) for epochs, source in read if least < epochs <= most),
                key=lambda pair: -pair[0],
            )
            if not found:
                continue
            epochs, worst = found[0]
            others = f" ({len(found) - 1} more of data.train more than {least} times)" if found[1:] else ""
            steps = max(1, int(self.config.stage.train_iters * AS_GOOD_AS_FRESH / epochs))
            blend = ", lower its data.train_weights" if len(self.train) > 1 else ""
            yield (
                f"{worst.setting}={worst.prefix} is read {_times(epochs)} times{others}: {words} "
                f"({_SOURCE}); add text{blend}, or lower stage.train_iters ({steps:,} would read it "
                f"{AS_GOOD_AS_FRESH} times)"
            )

    def _held_out(self) -> Iterator[str]:
        if not self.valid or any(source.size is None for source in self.valid):
            return
        stage, iters = self.config.stage, self.config.logging.eval_iters
        there, asked = sum(source.windows for source in self.valid), iters * stage.global_batch_size
        if there < asked:
            yield (
                f"data.valid holds {there:,} sequences of stage.seq_length={stage.seq_length:,}, but "
                f"logging.eval_iters={iters:,} x stage.global_batch_size={stage.global_batch_size:,} asks "
                f"for {asked:,}: an evaluation reads all there is; hold out more for a steadier number"
            )
        for source in self.valid:
            if source.windows and not source.read:
                enough = -(-there // stage.global_batch_size)
                yield (
                    f"{source.setting}={source.prefix} is never read: logging.eval_iters={iters:,} ends "
                    f"before it; {enough:,} reads all of data.valid"
                )


def plan_data(config: RunConfig) -> DataPlan:
    """Look at the datasets that a run names."""
    stage, data = config.stage, config.data
    train = [_measured(f"data.train[{number}]", prefix) for number, prefix in enumerate(data.train)]
    valid = [_measured(f"data.valid[{number}]", prefix) for number, prefix in enumerate(data.valid)]
    shares = _shares(config, [size for size, _ in train])
    samples = stage.train_iters * stage.global_batch_size
    sources = []
    for number, (prefix, (size, problem), share) in enumerate(zip(data.train, train, shares, strict=True)):
        windows = 0 if size is None else max(size.tokens - 1, 0) // stage.seq_length
        epochs = samples * share / windows if windows and share is not None else None
        sources.append(TrainSource(f"data.train[{number}]", prefix, size, problem, share, epochs))
    return DataPlan(config, sources, _held_out(config, valid))


def _measured(setting: str, prefix: str) -> tuple[DatasetSize | None, str | None]:
    try:
        check_prefix(setting, prefix)
        return dataset_size(prefix), None
    except DataError as error:
        return None, str(error)


def _shares(config: RunConfig, sizes: Sequence[DatasetSize | None]) -> Sequence[float | None]:
    weights = config.data.train_weights
    known = [size.tokens for size in sizes if size is not None]
    if len(sizes) == 1:
        return [1.0]
    if weights is None and len(known) < len(sizes):
        return [None] * len(sizes)
    tokens = known if weights is None else [0] * len(sizes)
    return blend_shares(weights, tokens, config.stage.seq_length) or [None] * len(sizes)


def _held_out(
    config: RunConfig, measured: Sequence[tuple[DatasetSize | None, str | None]]
) -> list[ValidSource]:
    """They are read one behind the other, as far as logging.eval_iters goes."""
    left = config.logging.eval_iters * config.stage.global_batch_size
    sources = []
    for number, (prefix, (size, problem)) in enumerate(zip(config.data.valid, measured, strict=True)):
        windows = 0 if size is None else -(-max(size.tokens - 1, 0) // config.stage.seq_length)
        read = min(windows, left)
        left -= read
        sources.append(ValidSource(f"data.valid[{number}]", prefix, size, problem, windows, read))
    return sources


def _times(epochs: float) -> str:
    return f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.1f}"
