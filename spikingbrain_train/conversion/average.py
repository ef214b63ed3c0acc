"""The average of several checkpoints of one architecture: plain, weighted, or with exponential decay."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from spikingbrain_train.checkpoint.data_files import MegatronCheckpointWriter
from spikingbrain_train.config.derivation import DERIVATION_FILE, Derivation
from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.companion_files import find_companion_files
from spikingbrain_train.conversion.export_checkpoint import DEFAULT_SHARD_SIZE
from spikingbrain_train.conversion.hf_config import read_hf_config
from spikingbrain_train.conversion.lineage import lineage
from spikingbrain_train.conversion.output_folder import check_output_folder, complete_folder
from spikingbrain_train.conversion.report import describe_layers
from spikingbrain_train.conversion.reshard import check_only_iteration
from spikingbrain_train.conversion.safetensors_io import SafetensorsWriter, TensorSpec
from spikingbrain_train.conversion.stored_weights import (
    HfWeights,
    MegatronWeights,
    Part,
    StoredWeights,
    deciding_settings,
    open_weights,
)
from spikingbrain_train.conversion.weight_values import ALLOW_DAMAGED_WEIGHTS, fault_of
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.tables import table
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    iteration_folder,
)
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

_BLOCK = 1 << 24  # numbers that are added at a time


@dataclass
class AverageReport:
    """What was averaged."""

    sources: list[str]
    shares: list[float]
    output: str
    layers: str
    tensors: int
    bytes: int
    dry_run: bool
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        """The report for a terminal."""
        rows = [("checkpoint", "share")]
        rows += [(name, f"{share:.4g}") for name, share in zip(self.sources, self.shares, strict=True)]
        lines = [f"average -> {self.output}", f"{self.layers} layers", "", *table(rows, left=1), ""]
        lines += [f"note: {note}" for note in self.notes]
        said = f"{self.bytes / 1e6:,.1f} MB in {self.tensors} tensors"
        lines.append(f"would write {said}" if self.dry_run else f"wrote {said} in {self.seconds:.1f} s")
        return "\n".join(lines)


def equal_shares(number: int) -> list[float]:
    """Of a plain average."""
    return [1 / number] * number


def decaying_shares(number: int, decay: float) -> list[float]:
    """Of an exponential moving average that begins with the first checkpoint: s = decay s + (1 - decay) x.

    Args:
        number: of checkpoints, the oldest first.
        decay: 0 to 1; the larger, the longer old ones are remembered.
    """
    shares = [(1 - decay) * decay ** (number - 1 - position) for position in range(number)]
    shares[0] = decay ** (number - 1)
    return shares


def average_checkpoints(
    checkpoints: Sequence[Path],
    output: Path,
    shares: Sequence[float],
    *,
    did: str = "average",
    overwrite: bool = False,
    allow_damaged_weights: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> AverageReport:
    """Write the average of checkpoints, all of Megatron or all of Hugging Face, in the same form.

    Sums are kept in float32, and equal numbers stay what they are, bit for bit. Tensors stream: in memory are
    one tensor (of experts, one expert) of one checkpoint, and its sum. The result of Megatron checkpoints has
    weights alone, at iteration 0: a run starts from it with ``checkpoint.load``.

    Args:
        checkpoints: two or more folders: run folders (their newest checkpoint is taken), ``iter_*`` folders,
            or Hugging Face folders. The small files of the last are taken.
        output: folder to be made; it appears whole or not at all.
        shares: the share of each, whose sum is 1.
        did: what sort of average it is, for the lineage.
        overwrite: replace an earlier result in ``output``.
        allow_damaged_weights: average tensors that hold NaN or infinities too.
        dry_run: check everything but the values and report without writing.
        progress: say on standard error how far it is.

    Raises:
        CheckpointError: checkpoints are missing, damaged or of different architectures or number formats, or
            the output cannot be written.
    """
    started = time.monotonic()
    members = [open_weights(path, "--checkpoints") for path in checkpoints]
    for member in members:
        if isinstance(member, HfWeights) and member.is_packed:
            raise CheckpointError(
                f"{member.folder} holds packed ternary weights, and an average of -1, 0 and 1 is none of "
                "them; average the checkpoints that such folders were exported from, and export the result"
            )
    first, last = members[0], members[-1]
    models = [_model_of(member) for member in members]
    for member, model in zip(members[1:], models[1:], strict=True):
        _check_alike(first, models[0], member, model)
    report = AverageReport(
        sources=[str(member.folder) for member in members],
        shares=list(shares),
        output=str(output),
        layers=describe_layers(models[-1]),
        tensors=len(last.tensors),
        bytes=last.nbytes,
        dry_run=dry_run,
    )
    is_hf = isinstance(last, HfWeights)
    for member in members:
        check_output_folder(
            output,
            source=member.folder,
            overwrite=overwrite,
            marker=DERIVATION_FILE if is_hf else f"{iteration_folder('', 0)}/{DERIVATION_FILE}",
            needed_bytes=report.bytes,
            dry_run=dry_run,
        )
    if not is_hf:
        check_only_iteration(output, 0)
    if dry_run:
        return report
    histories = [history_with(member.folder) for member in members]
    longest = max(range(len(members)), key=lambda number: histories[number].tokens)
    derivation = Derivation(
        did=f"{did} of {len(members)} checkpoints",
        sources=report.sources,
        weights=report.shares,
        history=histories[longest],
        lineage=[asdict(step) for step in lineage(members[longest].folder)],
    )
    averages = _Averages(members, shares, allow_damaged_weights=allow_damaged_weights)
    total = sum(member.nbytes for member in members)
    with complete_folder(output, progress=progress) as temporary:
        with activity("averaging", total, "B", shown=progress) as done:
            averages.on_read = done.advance
            if is_hf:
                report.notes += _write_hf(temporary, last, averages)
                derivation.write(temporary)
            else:
                target = iteration_folder(temporary, 0)
                target.mkdir()
                _write_megatron(target, last, models[-1], averages)
                derivation.write(target)
                (temporary / LATEST_ITERATION_FILE).write_text("0", encoding="utf-8")
        report.seconds = time.monotonic() - started
    return report


class _Averages:
    """The averaged tensors, one after the other."""

    def __init__(
        self, members: Sequence[StoredWeights], shares: Sequence[float], *, allow_damaged_weights: bool
    ) -> None:
        self._members = members
        self._shares = shares
        self._allow_damaged_weights = allow_damaged_weights
        self.on_read = lambda number: None

    def parts(self, name: str) -> Iterator[tuple[Part, Tensor]]:
        """The parts of one, in the number format of its sources."""
        dtype = self._members[0].tensors[name].dtype
        for part in self._members[0].parts(name):
            yield part, self._average(name, part).to(dtype)

    def _average(self, name: str, part: Part) -> Tensor:
        mean, weight = torch.zeros(part[1], dtype=torch.float32), 0.0
        for member, share in zip(self._members, self._shares, strict=True):
            tensor = member.read_part(name, part)
            if not self._allow_damaged_weights and (fault := fault_of(tensor, may_be_zero=True)):
                raise CheckpointError(
                    f"{member.folder}: {name} {fault}; leave this checkpoint out, or add "
                    f"{ALLOW_DAMAGED_WEIGHTS} to average it as it is"
                )
            weight += share
            if share > 0:
                self._add(mean.view(-1), tensor.reshape(-1), share / weight)
            self.on_read(tensor.nbytes)
        return mean

    @staticmethod
    def _add(mean: Tensor, values: Tensor, share: float) -> None:
        """Move the mean of those before towards the next: mean + share (values - mean)."""
        for start in range(0, mean.numel(), _BLOCK):
            block = mean[start : start + _BLOCK]
            block.lerp_(values[start : start + _BLOCK].float(), share)


def _write_megatron(target: Path, last: StoredWeights, model: ModelConfig, averages: _Averages) -> None:
    if (last.folder / HF_SOURCE_FOLDER).is_dir():
        # Links stay links: no file from elsewhere moves into the checkpoint.
        shutil.copytree(last.folder / HF_SOURCE_FOLDER, target / HF_SOURCE_FOLDER, symlinks=True)
    save_config(model, target / MODEL_CONFIG_FILE)
    with MegatronCheckpointWriter(target) as writer:
        for name, stored in last.tensors.items():
            for (offset, _), average in averages.parts(name):
                writer.write_chunk(name, stored.shape, offset, average)


def _write_hf(target: Path, last: StoredWeights, averages: _Averages) -> list[str]:
    companions = find_companion_files(last.folder)
    companions.copy_to(target)
    if not (target / CONFIG_FILE).is_file():
        shutil.copyfile(last.folder / CONFIG_FILE, target / CONFIG_FILE)
    hf_format, model = read_hf_config(last.folder)
    for name, text in hf_format.code_files(model).items():
        (target / name).write_text(text, encoding="utf-8")
    specs = [TensorSpec(name, stored.shape, stored.dtype) for name, stored in last.tensors.items()]
    specs.sort(key=lambda spec: -spec.dtype.itemsize)
    with SafetensorsWriter(target, specs, DEFAULT_SHARD_SIZE) as writer:
        for spec in specs:
            for _, average in averages.parts(spec.name):
                writer.write(spec.name, average)
    return companions.left_behind


def _model_of(member: StoredWeights) -> ModelConfig:
    return member.model if isinstance(member, MegatronWeights) else read_hf_config(member.folder)[1]


def _check_alike(first: StoredWeights, model: ModelConfig, other: StoredWeights, theirs: ModelConfig) -> None:
    """What can be averaged: one form, one architecture, one number format."""
    if first.kind != other.kind:
        raise CheckpointError(
            f"{first.folder} is a {first.kind} folder and {other.folder} a {other.kind} one; import or "
            "export one of them, and average checkpoints of one form"
        )
    a, b = deciding_settings(model), deciding_settings(theirs)
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            raise CheckpointError(
                f"{other.folder} has {name}={b.get(name)} where {first.folder} has {a.get(name)}; only "
                "checkpoints of one architecture have an average"
            )
    for name in dict.fromkeys([*first.tensors, *other.tensors]):
        mine, others = first.tensors.get(name), other.tensors.get(name)
        if mine is None or others is None:
            holder, lacking = (other, first) if mine is None else (first, other)
            raise CheckpointError(
                f"{holder.folder} holds the tensor {name}, which {lacking.folder} does not; only checkpoints "
                "of one architecture have an average"
            )
        if mine.shape != others.shape:
            raise CheckpointError(
                f"{other.folder}: {name} has shape {list(others.shape)}, but {list(mine.shape)} in "
                f"{first.folder}; only checkpoints of one architecture have an average"
            )
        if mine.dtype is not others.dtype:
            formats = [str(each.dtype).removeprefix("torch.") for each in (others, mine)]
            raise CheckpointError(
                f"{other.folder}: {name} is {formats[0]}, but {formats[1]} in {first.folder}; save both in "
                "one number format (export has --dtype) and average those"
            )
