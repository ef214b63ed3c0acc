"""A Megatron checkpoint laid out for other ranks: the same numbers in other chunks and files."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import torch

from spikingbrain_train.architecture.layers import has_experts
from spikingbrain_train.checkpoint.data_files import complete_checkpoint
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.derivation import DERIVATION_FILE, Derivation, read_derivation
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run_record import RUN_RECORD_FILE
from spikingbrain_train.conversion.lineage import lineage
from spikingbrain_train.conversion.megatron_source import check_tensors, read_model
from spikingbrain_train.conversion.parts import damage_in, stored_chunks
from spikingbrain_train.conversion.reshard_parts import PlannedTensor, ReshardParts, stored_objects
from spikingbrain_train.conversion.weight_values import describe_damage
from spikingbrain_train.conversion.work import Work
from spikingbrain_train.conversion.work_key import source_files, work_key
from spikingbrain_train.errors import CheckpointError, SpikingBrainError
from spikingbrain_train.planning.parallel_checks import check_split
from spikingbrain_train.planning.resume import read_stored_run
from spikingbrain_train.planning.shards import Shard, num_ranks, sharded_weights
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.reporting.tables import facts, terminal_width
from spikingbrain_train.runtime.checkpoint_metadata import COMMON_STATE_FILE, ONE_KEY_PER_LAYER
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

_COPIED = (MODEL_CONFIG_FILE, RUN_CONFIG_FILE, RUN_RECORD_FILE)


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
    needs: list[str] = field(default_factory=list)
    """What a dry run says that it will take."""
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
        lines = [f"{self.source} -> {self.output}", *facts(rows, terminal_width()), *self.needs]
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
    workers: int | None = 1,
    dry_run: bool = False,
    progress: bool = False,
) -> ReshardReport:
    """Lay the shards of a Megatron checkpoint out as the ranks of another topology would write them.

    Every number stays what it is, bit for bit: weights, optimizer state, schedule, random generators. Only
    the padding of the vocabulary, which is the topology's, changes. Shards stream in blocks: memory does not
    grow with them. No process group, no GPU. A call that was killed is gone on with by the next one with the
    same checkpoint and settings, to the same bytes.

    Args:
        checkpoint: a run folder (its newest checkpoint is taken) or one ``iter_*`` folder.
        output: folder to be made, with the same iteration in it; it appears whole or not at all.
        parallel: the topology; its tensor, pipeline, expert and expert tensor degrees are read.
        weights_only: leave optimizer and other training state out.
        overwrite: replace an earlier result in ``output``.
        allow_damaged_weights: copy tensors that hold NaN or infinities too, with a note.
        workers: processes that read and write; None takes what the machine has and the checkpoint is worth.
            The result does not depend on it.
        dry_run: check everything but the values and report, with what it will take, without writing.
        progress: say on standard error how far it is.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or the output cannot be written.
        ConfigurationError: the degrees do not divide the model.
    """
    started = time.monotonic()
    folder = resolve_checkpoint(checkpoint)
    model = read_model(folder)
    check_split(model, parallel)
    reader = MegatronCheckpointReader(folder, once=True)
    check_tensors(reader, model)
    plan = _plan(reader, model, parallel, weights_only=weights_only)
    objects = [] if weights_only else reader.objects
    parts = ReshardParts(reader, plan, objects, allow_damaged_weights=allow_damaged_weights)
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
        files=len(parts.sizes),
        dry_run=dry_run,
    )
    iteration = iteration_of(folder) if is_iteration_folder(folder) else _stored_iteration(folder)
    carried = [COMMON_STATE_FILE, *_COPIED]
    key = work_key(
        "reshard",
        source_files([*reader.paths, *(folder / name for name in carried if (folder / name).is_file())]),
        str(folder),  # derivation.json names it
        plan,
        objects,
        iteration,
        weights_only,
        allow_damaged_weights,
        parts.sizes,
    )
    work = Work.plan(
        parts,
        output,
        key,
        source=folder,
        reads=report.read_before,
        marker=f"{iteration_folder('', iteration)}/{DERIVATION_FILE}",
        workers=workers,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )
    check_only_iteration(output, iteration)
    if work.is_over(report):
        return report
    with work.begun() as workspace:
        target = iteration_folder(workspace.new, iteration)
        target.mkdir(exist_ok=True)
        _copy_small_files(reader, target, weights_only=weights_only, iteration=iteration)
        Derivation(
            did=f"laid out for {report.layout}",
            sources=[str(folder)],
            history=history_with(folder),
            lineage=[asdict(step) for step in lineage(folder)],
            layout=_degrees(parallel),
        ).write(target)
        records = work.write(workspace, target, "resharding")
        chunks = stored_chunks(records, {planned.name: prod(planned.size) for planned in plan})
        complete_checkpoint(target, chunks, stored_objects(records), iteration=None)
        report.notes += describe_damage(damage_in(records))
        (workspace.new / LATEST_ITERATION_FILE).write_text(str(iteration), encoding="utf-8")
        report.seconds = time.monotonic() - started
    return report


def describe_layout(parallel: ParallelConfig, model: ModelConfig) -> str:
    """Degrees in a few words: ``TP 2 x PP 2``, with ``x EP 4`` where there are experts."""
    words = f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}"
    if parallel.pipeline_model_parallel_layout is not None:
        words += f" ({' + '.join(str(number) for number in parallel.pipeline_model_parallel_layout)} layers)"
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
) -> list[PlannedTensor]:
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
            plan.append(PlannedTensor(name, size, shards, entry.properties.dtype, is_state))
        else:  # of no weight, as generators, which lie in rows of the ranks that wrote them
            shards = tuple(Shard(0, tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            rest.append(PlannedTensor(name, stored, shards, entry.properties.dtype, is_state))
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


def _bytes_to_load(reader: MegatronCheckpointReader, plan: list[PlannedTensor]) -> int:
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
    shutil.rmtree(target / HF_SOURCE_FOLDER, ignore_errors=True)  # what a killed call had copied of it
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


def _plural(number: int, word: str) -> str:
    return word if number == 1 else f"{word}s"
