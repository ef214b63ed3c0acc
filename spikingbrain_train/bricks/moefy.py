"""From a dense checkpoint to one of experts: partition, routers, what that costs, and the folder."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.bricks.moefy_parts import MoefyParts
from spikingbrain_train.bricks.neuron_model import NeuronModel
from spikingbrain_train.bricks.output_files import MOEFY_NUMBERS, MOEFY_PICTURE
from spikingbrain_train.bricks.partition import clustered_bricks, coactive_bricks, random_bricks
from spikingbrain_train.bricks.routers import (
    Recording,
    Routed,
    Router,
    centre_router,
    fitted_router,
    random_router,
)
from spikingbrain_train.bricks.trained_router import trained_router
from spikingbrain_train.checkpoint.data_files import complete_checkpoint
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.derivation import DERIVATION_FILE, Derivation
from spikingbrain_train.config.load import save_config
from spikingbrain_train.config.model import ModelConfig, MoEConfig
from spikingbrain_train.conversion.lineage import lineage
from spikingbrain_train.conversion.parts import one_thread, stored_chunks
from spikingbrain_train.conversion.work import Work
from spikingbrain_train.conversion.work_key import source_files, work_key
from spikingbrain_train.evaluation.output import write_result
from spikingbrain_train.evaluation.text_windows import cross_entropy_of, windows_asked_for
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.plots.routers_picture import RoutersPicture, draw_routers
from spikingbrain_train.reporting.tables import table
from spikingbrain_train.storage.checkpoint_folder import (
    HF_SOURCE_FOLDER,
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    iteration_folder,
)

_Layers = dict[int, Tensor]
_Routers = dict[int, Router]


def run(model: NeuronModel, checkpoint: Path, target: ModelConfig, arguments: argparse.Namespace) -> None:
    """Cut, fit, measure, write and print.

    Args:
        model: the dense checkpoint on one rank.
        checkpoint: its folder.
        target: architecture of the result.
        arguments: of ``spikingbrain-bricks moefy``.
    """
    language_model, number = model.language_model, target.moe.num_experts
    windows = windows_asked_for(arguments, language_model)
    half = len(windows) // 2
    with one_thread():  # the same bytes by the same command, however many cores there are
        with Recording(model) as recording:
            cross_entropy_of(language_model, windows[:half], "recording")
        parts = _partitions(model, recording, number, arguments)
        routers = {
            name: _routers(model, recording, bricks, number, arguments) for name, bricks in parts.items()
        }
        if arguments.router == "mlp":
            own = parts[arguments.partition]
            trained = _trained(model, recording, own, target.moe, arguments.seed)
            routers[arguments.partition] = {"mlp": trained, **routers[arguments.partition]}
    measured = _measured(model, windows[half:], parts, routers, number, arguments)
    bricks = parts[arguments.partition]
    written = _write(checkpoint, target, bricks, routers[arguments.partition][arguments.router], arguments)
    result = {
        "model": model.name,
        "experts": number,
        "topk": target.moe.router_topk,
        "partition": arguments.partition,
        "router": arguments.router,
        "windows": arguments.windows,
        "seq_length": arguments.seq_length,
        "rows": measured,
    }
    write_result(arguments.output / MOEFY_NUMBERS, result)
    if len({row["k"] for row in measured}) > 2:  # of one there is no curve
        draw_routers(_picture(measured, number), arguments.output / MOEFY_PICTURE)
    if measured:
        print("\n".join([*_lines(measured, number), ""]))
    print(f"wrote {written / 1e6:,.1f} MB to {arguments.output}")


def _gate_rows(model: NeuronModel) -> _Layers:
    """[2 F, h] float32: gate rows, then up rows, by layer."""
    found = {}
    for each in model.feed_forwards:
        weight: Any = getattr(each.into, "weight")  # noqa: B009  (torch's own __getattr__ has no type)
        found[each.part.layer] = weight.detach().float().cpu()
    return found


def _partitions(
    model: NeuronModel, recording: Recording, number: int, arguments: argparse.Namespace
) -> dict[str, _Layers]:
    """The one that was asked for, and the random one beside it."""
    found: dict[str, _Layers] = {arguments.partition: {}, "random": {}}
    with activity("cutting", len(model.feed_forwards), "layers") as done:
        for layer, rows in done.over(list(_gate_rows(model).items())):
            channels, seed = len(rows) // 2, 1000 * arguments.seed + layer
            found["random"][layer] = random_bricks(channels, number, seed)
            if arguments.partition == "clusters":
                gate, up = (torch.nn.functional.normalize(each, dim=1) for each in rows.split(channels))
                found["clusters"][layer] = clustered_bricks(torch.cat((gate, up), 1), number, seed)
            elif arguments.partition == "coactivation":
                norms = torch.cat(recording.norms[layer])
                found["coactivation"][layer] = coactive_bricks(norms, number, seed)
    return found


def _routers(
    model: NeuronModel,
    recording: Recording,
    bricks: Mapping[int, Tensor],
    number: int,
    arguments: argparse.Namespace,
) -> dict[str, _Routers]:
    found: dict[str, _Routers] = {"fitted": {}, "centres": {}, "random": {}}
    for layer, rows in _gate_rows(model).items():
        inputs, norms = torch.cat(recording.inputs[layer]), torch.cat(recording.norms[layer])
        found["fitted"][layer] = fitted_router(inputs, norms, bricks[layer], number)
        found["centres"][layer] = centre_router(rows[: len(rows) // 2], bricks[layer], number)
        found["random"][layer] = random_router(rows.shape[1], number, 1000 * arguments.seed + layer)
    return found


def _trained(
    model: NeuronModel, recording: Recording, bricks: Mapping[int, Tensor], moe: MoEConfig, seed: int
) -> _Routers:
    """Those with a hidden layer."""
    found: _Routers = {}
    assert moe.router_hidden_size is not None
    with activity("training routers", len(model.feed_forwards), "layers") as done:
        for each in done.over(model.feed_forwards):
            layer = each.part.layer
            inputs, norms = torch.cat(recording.inputs[layer]), torch.cat(recording.norms[layer])
            size = (moe.num_experts, moe.router_hidden_size)
            found[layer] = trained_router(inputs, norms, bricks[layer], *size, 1000 * seed + layer)
    return found


def _measured(
    model: NeuronModel,
    windows: Sequence[Sequence[int]],
    parts: Mapping[str, _Layers],
    routers: Mapping[str, Mapping[str, _Routers]],
    number: int,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Cross entropy of the dense model, and of every number of experts that was asked for."""
    rows: list[dict[str, Any]] = []

    def measure(partition: str, router: str, k: int, context: AbstractContextManager[None]) -> None:
        with context:
            what = f"reading with {k} of {number} experts ({partition}, {router})"
            cross_entropy = cross_entropy_of(model.language_model, windows, what)
        rows.append({"partition": partition, "router": router, "k": k, "cross_entropy": cross_entropy})

    counts = [arguments.topk] if arguments.measure is None else sorted(set(arguments.measure))
    if not counts:
        return []
    measure("dense", "none", number, nullcontext())
    for k in counts:
        own = arguments.partition
        measure(own, "oracle", k, Routed(model, parts[own], number, k, None))
        for name, router in routers[own].items():
            measure(own, name, k, Routed(model, parts[own], number, k, router))
        if own != "random":
            measure("random", "oracle", k, Routed(model, parts["random"], number, k, None))
            fitted = routers["random"]["fitted"]
            measure("random", "fitted", k, Routed(model, parts["random"], number, k, fitted))
    return rows


def _write(
    checkpoint: Path, target: ModelConfig, bricks: _Layers, router: _Routers, arguments: argparse.Namespace
) -> int:
    """The checkpoint, by parts; a call that was killed is gone on with. Returns its bytes."""
    reader = MegatronCheckpointReader(checkpoint)
    parts = MoefyParts(reader, target, bricks, router)
    values = hashlib.sha256()
    for layer in sorted(bricks):
        values.update(bricks[layer].numpy().tobytes())
        for matrix in (router[layer].weight, router[layer].hidden):
            values.update(b"" if matrix is None else matrix.numpy().tobytes())
    key = work_key("moefy", source_files(reader.paths), target, values.hexdigest(), parts.sizes)
    work = Work.plan(
        parts,
        arguments.output,
        key,
        source=checkpoint,
        reads=reader.nbytes,
        marker=f"{iteration_folder('', 0)}/{DERIVATION_FILE}",
        workers=1,
        overwrite=arguments.overwrite,
        dry_run=False,
        progress=True,
    )
    if work.leftover.is_complete:
        return sum(parts.sizes)
    with work.begun() as workspace:
        folder = iteration_folder(workspace.new, 0)
        shutil.rmtree(folder / HF_SOURCE_FOLDER, ignore_errors=True)  # what a killed call had copied of it
        folder.mkdir(exist_ok=True)
        if (checkpoint / HF_SOURCE_FOLDER).is_dir():
            # Links stay links: no file from elsewhere moves into the checkpoint.
            shutil.copytree(checkpoint / HF_SOURCE_FOLDER, folder / HF_SOURCE_FOLDER, symlinks=True)
        records = work.write(workspace, folder, "writing")
        complete_checkpoint(folder, stored_chunks(records, parts.planned))
        save_config(target, folder / MODEL_CONFIG_FILE)
        Derivation(
            did=f"feed-forwards cut into {target.moe.num_experts} experts ({arguments.partition}, "
            f"{arguments.router} routers), {target.moe.router_topk} for a token",
            sources=[str(checkpoint)],
            history=history_with(checkpoint),
            lineage=[asdict(step) for step in lineage(checkpoint)],
        ).write(folder)
        (workspace.new / LATEST_ITERATION_FILE).write_text("0", encoding="utf-8")
    return sum(parts.sizes)


def _picture(rows: Sequence[Mapping[str, Any]], number: int) -> RoutersPicture:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        cut = "" if row["partition"] != "random" else " (cut at random)"
        point = (100 * row["k"] / number, row["cross_entropy"])
        curves.setdefault(f"{row['router']}{cut}", []).append(point)
    return RoutersPicture(curves, rows[0]["cross_entropy"])


def _lines(rows: Sequence[Mapping[str, Any]], number: int) -> list[str]:
    dense = rows[0]["cross_entropy"]
    cells = [["experts", "cut by", "router", "cross entropy", "more"]]
    for row in rows:
        entropy = row["cross_entropy"]
        cells.append(
            [
                f"{row['k']} of {number}",
                row["partition"],
                row["router"],
                f"{entropy:.4f}",
                f"{entropy - dense:+.4f}",
            ]
        )
    return table(cells, 3)
