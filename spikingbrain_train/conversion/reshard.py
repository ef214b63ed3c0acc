"""A Megatron checkpoint laid out for other ranks: the same numbers in other chunks and files."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import torch

from spikingbrain_train.architecture.layers import has_experts
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.checkpoint.rank_files import RankFilesWriter
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.derivation import DERIVATION_FILE, Derivation, read_derivation
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run_record import RUN_RECORD_FILE
from spikingbrain_train.conversion.export_checkpoint import check_tensors
from spikingbrain_train.conversion.lineage import lineage
from spikingbrain_train.conversion.output_folder import check_output_folder, complete_folder
from spikingbrain_train.conversion.weight_values import ALLOW_DAMAGED_WEIGHTS, fault_of
from spikingbrain_train.errors import CheckpointError, SpikingBrainError
from spikingbrain_train.planning.parallel_checks import check_split
from spikingbrain_train.planning.resume import read_stored_run
from spikingbrain_train.planning.shards import Shard, num_ranks, sharded_weights
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.tables import facts, terminal_width
from spikingbrain_train.runtime.checkpoint_metadata import COMMON_STATE_FILE, ONE_KEY_PER_LAYER, read_metadata
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    RUN_CONFIG_FILE,
    is_iteration_folder,
    iteration_folder,
    iteration_of,
    iterations,
)
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.stored_layers import check_number_of_layers

_COPIED = (MODEL_CONFIG_FILE, RUN_CONFIG_FILE, RUN_RECORD_FILE)


@dataclass(frozen=True)
class _Planned:
    """One tensor of the result."""

    name: str
    size: tuple[int, ...]
    shards: tuple[Shard, ...]
    dtype: torch.dtype
    is_state: bool
    """Whether it is of the optimizer or another state of training, not a weight."""

    @property
    def nbytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize


@dataclass
class ReshardReport:
    """What was laid out anew, and what that gives."""

    source: str
    output: str
    layout: str
    """What it is laid out for: ``TP 2 x PP 2``."""
    written_by: str
    """What the source was laid out for, as far as it says."""
    ranks: int
    weights: int
    weight_bytes: int
    state: int
    """Tensors of the optimizer and other state of training."""
    state_bytes: int
    read_before: int
    """Bytes that the ranks of one replica read together to load the source at this layout."""
    read_after: int
    """The same of the result."""
    files: int
    dry_run: bool
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        """The report for a terminal."""
        saved = f"{self.read_before / 1e6:,.1f} MB before, {self.read_after / 1e6:,.1f} MB now"
        rows = [
            (
                "layout:",
                f"{self.layout}, of {self.ranks} {_plural(self.ranks, 'rank')} (was {self.written_by})",
            ),
            ("weights:", f"{self.weights} tensors, {self.weight_bytes / 1e6:,.1f} MB"),
            (
                "training:",
                f"{self.state} tensors, {self.state_bytes / 1e6:,.1f} MB" if self.state else "none",
            ),
            ("loading:", f"the ranks of a replica read {saved}"),
            *(("note:", note) for note in self.notes),
        ]
        lines = [f"{self.source} -> {self.output}", *facts(rows, terminal_width())]
        total = (self.weight_bytes + self.state_bytes) / 1e6
        if self.dry_run:
            lines.append(f"would write {total:,.1f} MB in {self.files} {_plural(self.files, 'file')}")
        else:
            files = _plural(self.files, "file")
            lines.append(f"wrote {total:,.1f} MB in {self.files} {files} in {self.seconds:.1f} s")
        return "\n".join(lines)


def reshard_checkpoint(
    checkpoint: Path,
    output: Path,
    parallel: ParallelConfig,
    *,
    weights_only: bool = False,
    overwrite: bool = False,
    allow_damaged_weights: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> ReshardReport:
    """Lay the shards of a Megatron checkpoint out as the ranks of another topology would write them.

    Every number stays what it is, bit for bit: weights, optimizer state, schedule, random generators. Only
    the padding of the vocabulary, which is the topology's, changes. No more than a chunk as it was stored and
    one of the result are in memory. No process group, no GPU.

    Args:
        checkpoint: a run folder (its newest checkpoint is taken) or one ``iter_*`` folder.
        output: folder to be made, with the same iteration in it; it appears whole or not at all.
        parallel: the topology; its tensor, pipeline, expert and expert tensor degrees are read.
        weights_only: leave optimizer and other training state out.
        overwrite: replace an earlier result in ``output``.
        allow_damaged_weights: copy tensors that hold NaN or infinities too.
        dry_run: check everything but the values and report without writing.
        progress: say on standard error how far it is.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or the output cannot be written.
        ConfigurationError: the degrees do not divide the model.
    """
    started = time.monotonic()
    folder = resolve_checkpoint(checkpoint)
    model = read_stored_model(folder)
    check_number_of_layers(
        f"{folder / MODEL_CONFIG_FILE}: num_layers",
        model.num_layers,
        lambda: read_metadata(folder).state_dict_metadata,
    )
    check_split(model, parallel)
    reader = MegatronCheckpointReader(folder)
    check_tensors(reader, model)
    plan = _plan(reader, model, parallel, weights_only=weights_only)
    objects = [] if weights_only else reader.objects
    files = {shard.rank for planned in plan for shard in planned.shards} | ({0} if objects else set())
    report = ReshardReport(
        source=str(folder),
        output=str(output),
        layout=describe_layout(parallel, model),
        written_by=describe_origin(folder),
        ranks=num_ranks(parallel),
        weights=sum(not planned.is_state for planned in plan),
        weight_bytes=sum(planned.nbytes for planned in plan if not planned.is_state),
        state=sum(planned.is_state for planned in plan),
        state_bytes=sum(planned.nbytes for planned in plan if planned.is_state),
        read_before=_bytes_to_load(reader, plan),
        read_after=sum(planned.nbytes for planned in plan),
        files=len(files),
        dry_run=dry_run,
    )
    iteration = iteration_of(folder) if is_iteration_folder(folder) else _stored_iteration(folder)
    _check_output(output, folder, iteration, overwrite=overwrite, report=report, dry_run=dry_run)
    if dry_run:
        return report
    with complete_folder(output, progress=progress) as temporary:
        target = iteration_folder(temporary, iteration)
        target.mkdir()
        _copy_small_files(reader, target, weights_only=weights_only, iteration=iteration)
        Derivation(
            did=f"laid out for {report.layout}",
            sources=[str(folder)],
            history=history_with(folder),
            lineage=[asdict(step) for step in lineage(folder)],
            layout=_degrees(parallel),
        ).write(target)
        total = report.weight_bytes + report.state_bytes
        with (
            activity("resharding", total, "B", shown=progress) as done,
            RankFilesWriter(target) as writer,
        ):
            for planned in plan:
                for shard in planned.shards:
                    part = reader.read_region(planned.name, shard.offset, shard.shape)
                    if not allow_damaged_weights and part.is_floating_point():
                        _refuse_damaged(folder, planned.name, part)
                    writer.write_chunk(shard.rank, planned.name, planned.size, shard.offset, part)
                    done.advance(part.nbytes)
            for name in objects:
                writer.write_object(0, name, reader.read_object(name))
            report.files = writer.num_files
        (temporary / LATEST_ITERATION_FILE).write_text(str(iteration), encoding="utf-8")
        report.seconds = time.monotonic() - started
    return report


def describe_layout(parallel: ParallelConfig, model: ModelConfig) -> str:
    """Degrees in a few words: ``TP 2 x PP 2``, with ``x EP 4`` where there are experts."""
    words = f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}"
    if not has_experts(model):
        return words
    words += f" x EP {parallel.expert_model_parallel_size}"
    tensor = parallel.expert_tensor_size
    return words if tensor == parallel.tensor_model_parallel_size else f"{words} (experts: TP {tensor})"


def _degrees(parallel: ParallelConfig) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }


def describe_origin(folder: Path) -> str:
    """What the shards of a checkpoint are laid out for, as its files say."""
    if (derivation := read_derivation(folder)) is not None and derivation.layout is not None:
        return derivation.did
    if not (folder / RUN_CONFIG_FILE).is_file():
        return "one process"
    try:
        stored = read_stored_run(folder)
    except SpikingBrainError:
        return f"written by a run whose {RUN_CONFIG_FILE} cannot be read"
    layout = describe_layout(stored.config.parallel, stored.config.model)
    return f"{layout}, written by {stored.world_size} {_plural(stored.world_size, 'rank')}"


def _plan(
    reader: MegatronCheckpointReader, model: ModelConfig, parallel: ParallelConfig, *, weights_only: bool
) -> list[_Planned]:
    """Every tensor of the result: weights, then each state of a weight in the same chunks, then the rest."""
    sharded = {each.weight.name: each for each in sharded_weights(model, parallel)}
    plan, rest = [], []
    for name, entry in reader.tensors.items():
        of = _weight_of(name, sharded)
        is_state = name not in sharded
        if weights_only and is_state:
            continue
        stored = tuple(entry.size)
        shape = None if of is None else sharded[of].weight.shape
        if (
            of is not None
            and shape is not None
            and _is_alike(stored, shape, sharded[of].weight.pads_vocabulary)
        ):
            size, shards = sharded[of].size, sharded[of].shards
            plan.append(_Planned(name, size, shards, entry.properties.dtype, is_state))
        else:  # of no weight, as generators, which lie in rows of the ranks that wrote them
            shards = tuple(Shard(0, tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            rest.append(_Planned(name, stored, shards, entry.properties.dtype, is_state))
    order = {name: position for position, name in enumerate(sharded)}
    plan.sort(key=lambda planned: (planned.is_state, order.get(_weight_of(planned.name, sharded) or "", 0)))
    return plan + rest


def _is_alike(stored: tuple[int, ...], shape: tuple[int, ...], pads_vocabulary: bool) -> bool:
    if len(stored) != len(shape) or stored[1:] != shape[1:]:
        return False
    return stored[0] >= shape[0] if pads_vocabulary else stored[0] == shape[0]


def _weight_of(name: str, weights: dict) -> str | None:
    """The weight that a tensor is, or is a state of: optimizers put words in front of its name."""
    start = 0
    while start >= 0:
        candidate = name[start:]
        if candidate in weights:
            return candidate
        start = name.find(".", start) + 1 or -1
    return None


def _bytes_to_load(reader: MegatronCheckpointReader, plan: list[_Planned]) -> int:
    """What ranks read of the stored chunks, each whole, to fill the shards of ``plan``."""
    return sum(
        chunk.sizes.numel() * planned.dtype.itemsize
        for planned in plan
        for shard in planned.shards
        for chunk in reader.chunks_of(planned.name, shard.offset, shard.shape)
    )


def _stored_iteration(folder: Path) -> int:
    """The iteration of a folder that was copied under another name."""
    try:
        common = torch.load(folder / COMMON_STATE_FILE, map_location="cpu", weights_only=True)
        return int(common["iteration"])
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(
            f"{folder} does not say its iteration ({error or type(error).__name__}); name the folder as it "
            "was written, iter_ and seven digits"
        ) from None


def _check_output(
    output: Path, folder: Path, iteration: int, *, overwrite: bool, report: ReshardReport, dry_run: bool
) -> None:
    check_output_folder(
        output,
        source=folder,
        overwrite=overwrite,
        marker=f"{iteration_folder('', iteration)}/{DERIVATION_FILE}",
        needed_bytes=report.weight_bytes + report.state_bytes,
        dry_run=dry_run,
    )
    check_only_iteration(output, iteration)


def check_only_iteration(output: Path, iteration: int) -> None:
    """That replacing ``output`` removes no checkpoint but this one: a run may have gone on from it there.

    Raises:
        CheckpointError: it holds another one.
    """
    if others := [number for number in iterations(output) if number != iteration]:
        raise CheckpointError(
            f"--output {output} also holds {iteration_folder(output, others[0])}, which --overwrite would "
            "remove; choose another folder"
        )


def _copy_small_files(
    reader: MegatronCheckpointReader, target: Path, *, weights_only: bool, iteration: int
) -> None:
    """Whatever a checkpoint holds beside its shards; of weights alone no run can go on."""
    for name in _COPIED[:1] if weights_only else _COPIED:
        if (reader.folder / name).is_file():
            shutil.copyfile(reader.folder / name, target / name)
    if (reader.folder / HF_SOURCE_FOLDER).is_dir():
        # Links stay links: no file from elsewhere moves into the checkpoint.
        shutil.copytree(reader.folder / HF_SOURCE_FOLDER, target / HF_SOURCE_FOLDER, symlinks=True)
    if weights_only:
        common = {"iteration": iteration, "content_metadata": dict(ONE_KEY_PER_LAYER)}
        torch.save(common, target / COMMON_STATE_FILE)
        return
    reader.check_file(COMMON_STATE_FILE)
    try:
        shutil.copyfile(reader.folder / COMMON_STATE_FILE, target / COMMON_STATE_FILE)
    except FileNotFoundError:
        raise CheckpointError(
            f"{reader.folder / COMMON_STATE_FILE} is missing; copy the checkpoint again"
        ) from None


def _refuse_damaged(folder: Path, name: str, part: torch.Tensor) -> None:
    if fault := fault_of(part, may_be_zero=True):
        raise CheckpointError(
            f"{folder}: {name} {fault}; reshard an earlier checkpoint of the run, or add "
            f"{ALLOW_DAMAGED_WEIGHTS} to copy it as it is"
        )


def _plural(number: int, word: str) -> str:
    return word if number == 1 else f"{word}s"
