"""What a run reads: how large each of its datasets is, and how often it is read. Pure Python: no torch.

Only heads of files are read, and of examples where their loss lies, so a plan of terabytes takes no longer. A
dataset that is not here is no error: a plan may be made where the data is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import blend_shares
from spikingbrain_train.errors import DataError
from spikingbrain_train.planning.data_position import samples_of
from spikingbrain_train.planning.example_packing import fill, fitting_examples, pack
from spikingbrain_train.planning.file_checks import check_prefix
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.storage.index_format import DatasetSize, dataset_size
from spikingbrain_train.storage.loss_mask_format import has_loss_mask

AS_GOOD_AS_FRESH, WORTH_LITTLE = 4, 16
"""Epochs up to which repeated tokens are nearly as good as fresh ones, and beyond which they add little.

Their worth decays with a constant of about 15 repetitions. Measured in pretraining from scratch, see
Muennighoff et al., Scaling Data-Constrained Language Models, arXiv 2305.16264."""
_SOURCE = "Muennighoff et al., arXiv 2305.16264"


@dataclass(frozen=True)
class ExamplesPlan:
    """How the examples of a dataset become sequences."""

    sequences: int
    fill: float
    """Share of their positions that hold tokens of examples."""
    read: int
    truncated: int
    """Examples that are cut off at the end of a sequence."""
    dropped: int
    """Examples that are left out."""


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
    examples: ExamplesPlan | None = None
    """How its examples are packed; None of text."""


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
    examples: ExamplesPlan | None = None
    """How its examples are packed; None of text."""


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
        return [*found, *self._too_short(), *self._repeated(), *self._held_out(), *self.examples_warnings()]

    def examples_warnings(self) -> Iterator[str]:
        """Examples that a sequence is too short for, and masks that nothing reads."""
        stage = self.config.stage
        sources: list[TrainSource | ValidSource] = [*self.train, *self.valid]
        for source in sources:
            given = f"{source.setting}={source.prefix}"
            if source.examples is not None:
                found = source.examples
                for count, words in ((found.truncated, "cut off there"), (found.dropped, "left out")):
                    if count:
                        yield (
                            f"{given}: {count:,} of {found.read + found.dropped:,} examples are longer than "
                            f"stage.seq_length={stage.seq_length:,} and are {words} (stage.sft.long_examples="
                            f"{stage.sft.long_examples.name}); a longer sequence reads them whole"
                        )
            elif source.size is not None and has_loss_mask(source.prefix):
                yield (
                    f"{given} has a loss mask, which stage.kind={stage.kind} does not read: every token "
                    "carries loss; its answers alone are learnt with stage.kind=sft"
                )

    def _too_short(self) -> Iterator[str]:
        if kind_of(self.config.stage).reads_examples:
            return
        length = self.config.stage.seq_length
        for source in self.train:
            if source.size is not None and source.size.tokens <= length:
                yield (
                    f"{source.setting}={source.prefix} has {source.size.tokens:,} tokens, but one sample "
                    f"needs {length + 1:,} (stage.seq_length + 1): a run will refuse it; add text, or leave "
                    "it out"
                )

    def _repeated(self) -> Iterator[str]:
        if kind_of(self.config.stage).reads_examples:  # measured in pretraining
            return
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
            blend = ", lower its weight in data.train" if len(self.train) > 1 else ""
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
    train = [
        _measured(config, f"data.train[{number}]", prefix)
        for number, prefix in enumerate(data.train_prefixes)
    ]
    valid = [_measured(config, f"data.valid[{number}]", prefix) for number, prefix in enumerate(data.valid)]
    shares = _shares(config, train)
    samples = samples_of(config)
    sources = []
    for number, (prefix, found, share) in enumerate(zip(data.train_prefixes, train, shares, strict=True)):
        windows = found.windows(stage.seq_length)
        epochs = samples * share / windows if windows and share is not None else None
        source = TrainSource(
            f"data.train[{number}]", prefix, found.size, found.problem, share, epochs, found.examples
        )
        sources.append(source)
    return DataPlan(config, sources, _held_out(config, valid))


@dataclass(frozen=True)
class _Measured:
    """What the files of a dataset say."""

    size: DatasetSize | None = None
    problem: str | None = None
    examples: ExamplesPlan | None = None

    def windows(self, seq_length: int, *, padded: bool = False) -> int:
        """Sequences of one epoch; with the last one, which is not full, where it is ``padded``."""
        if self.examples is not None:
            return self.examples.sequences
        labels = 0 if self.size is None else max(self.size.tokens - 1, 0)
        return -(-labels // seq_length) if padded else labels // seq_length


def _measured(config: RunConfig, setting: str, prefix: str) -> _Measured:
    try:
        check_prefix(setting, prefix)
        reads_examples = kind_of(config.stage).reads_examples
        return _Measured(dataset_size(prefix), examples=_packed(config, prefix) if reads_examples else None)
    except DataError as error:
        return _Measured(problem=str(error))


def _packed(config: RunConfig, prefix: str) -> ExamplesPlan:
    length = config.stage.seq_length
    fitting = fitting_examples(prefix, length, config.stage.sft.long_examples)
    sequences = pack(fitting.lengths, length).sequences
    filled = fill(fitting.lengths, sequences, length)
    return ExamplesPlan(sequences, filled, fitting.read, fitting.truncated, fitting.dropped)


def _shares(config: RunConfig, measured: Sequence[_Measured]) -> Sequence[float | None]:
    weights, length = config.data.train_weights, config.stage.seq_length
    if len(measured) == 1:
        return [1.0]
    if weights is None and any(found.size is None for found in measured):
        return [None] * len(measured)
    # A blend is by windows, as many as these tokens make.
    tokens = [found.windows(length) * length + 1 for found in measured]
    return blend_shares(weights, tokens, length) or [None] * len(measured)


def _held_out(config: RunConfig, measured: Sequence[_Measured]) -> list[ValidSource]:
    """They are read one behind the other, as far as logging.eval_iters goes."""
    left = config.logging.eval_iters * config.stage.global_batch_size
    sources = []
    for number, (prefix, found) in enumerate(zip(config.data.valid, measured, strict=True)):
        windows = found.windows(config.stage.seq_length, padded=True)
        read = min(windows, left)
        left -= read
        setting = f"data.valid[{number}]"
        source = ValidSource(setting, prefix, found.size, found.problem, windows, read, found.examples)
        sources.append(source)
    return sources


def _times(epochs: float) -> str:
    return f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.1f}"
