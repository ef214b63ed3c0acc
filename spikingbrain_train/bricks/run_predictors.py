"""From a model with zeros to predictors of its activity, tables, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.activation_sparsity.gate_records import Part
from spikingbrain_train.bricks.activity_predictor import Activity, Fitted, fitted_predictor
from spikingbrain_train.bricks.neuron_model import NeuronModel
from spikingbrain_train.bricks.output_files import (
    PREDICTORS_NUMBERS,
    PREDICTORS_PICTURE,
    PREDICTORS_WEIGHTS,
)
from spikingbrain_train.bricks.predictors_report import PredictedReading, PredictorsReport
from spikingbrain_train.bricks.recorded_activity import Hits, Predicted, record_activity
from spikingbrain_train.evaluation.output import write_result
from spikingbrain_train.evaluation.text_windows import cross_entropy_of, windows_asked_for
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.plots.predictors_picture import PredictorsPicture, draw_predictors
from spikingbrain_train.storage.durable_files import replaced_durably

_KEPT_BACK = 8
"""One window of so many that are trained on is kept back for cut-offs, and at least one."""


def run(model: NeuronModel, arguments: argparse.Namespace) -> None:
    """Record, train, measure, print and write; on several ranks all call it together.

    Args:
        model: whose neurons are zero at many tokens.
        arguments: of ``spikingbrain-bricks predictors``.
    """
    language_model = model.language_model
    with activity("opening the text", shown=language_model.is_main_process):
        windows = windows_asked_for(arguments, language_model)
    learnt, held_out = windows[: -arguments.held_out], windows[-arguments.held_out :]
    kept = max(1, len(learnt) // _KEPT_BACK)
    hidden = arguments.hidden or max(1, _width(model) // 4)
    back, back_cross_entropy = record_activity(model, learnt[-kept:], "recording what is kept back")
    recorded, cross_entropy = record_activity(model, learnt[:-kept], "recording")
    fitted = _fitted(model, recorded, back, hidden, arguments)
    whole = cross_entropy_of(language_model, held_out, "reading with all neurons")
    readings = _readings(model, fitted, held_out, arguments.recall)
    ranks = model.gathered((_weights(fitted), _training(model, fitted)))
    if not language_model.is_main_process:
        return
    weights: dict[str, Tensor] = {}
    training: dict[str, dict[str, Any]] = {}
    for of_rank, rows in ranks:  # tensor-parallel ranks have the same
        weights |= of_rank
        training |= rows
    ordered = [training[name] for name in sorted(training, key=_in_order)]
    report = PredictorsReport(
        model=model.name,
        form=model.form,
        dtype=model.dtype,
        text=" ".join(arguments.text or arguments.data),
        seq_length=arguments.seq_length,
        hidden=hidden,
        parameters=(
            sum(row["predictor_parameters"] for row in ordered),
            sum(row["parameters"] for row in ordered),
        ),
        tokens=tuple(arguments.seq_length * each for each in (len(learnt) - kept, kept, len(held_out))),
        trained_cross_entropy=(cross_entropy * (len(learnt) - kept) + back_cross_entropy * kept)
        / len(learnt),
        cross_entropy=whole,
        training=[row for row in ordered if row["tokens"]],
        without=[row["name"] for row in ordered if not row["tokens"]],
        readings=readings,
    )
    print("\n".join(report.lines()))
    if arguments.output is not None:
        _write(report, weights, arguments)


def _width(model: NeuronModel) -> int:
    """Of what the feed-forwards read; a pipeline stage may have none."""
    mine = [each.width for each in model.feed_forwards]
    return max(max(of_rank, default=0) for of_rank in model.gathered(mine))


def _fitted(
    model: NeuronModel,
    recorded: dict[Part, Activity],
    kept_back: Mapping[Part, Activity],
    hidden: int,
    arguments: argparse.Namespace,
) -> dict[Part, Fitted]:
    """Predictors of all feed-forwards that have tokens; what was recorded of each is dropped."""
    found = {}
    shown = model.language_model.is_main_process
    parts = [part for part in sorted(recorded) if part in kept_back]
    with activity("training predictors", len(parts) * arguments.epochs, "epochs", shown=shown) as done:
        for part in parts:
            spent = 0

            def show() -> None:
                nonlocal spent
                spent += 1
                done.advance()

            device = next(each.norms.device for each in model.feed_forwards if each.part == part)
            found[part] = fitted_predictor(
                recorded.pop(part),
                kept_back[part],
                hidden=hidden,
                recalls=arguments.recall,
                epochs=arguments.epochs,
                seed=arguments.seed,
                device=device,
                show=show,
            )
            done.advance(arguments.epochs - spent)
    return found


def _readings(
    model: NeuronModel,
    fitted: Mapping[Part, Fitted],
    windows: Sequence[Sequence[int]],
    recalls: Sequence[float],
) -> list[PredictedReading]:
    """The held-out text with each of the cut-offs."""
    cutoffs: list[tuple[float | None, dict[Part, float]]] = [(None, dict.fromkeys(fitted, 0.0))]
    for number, recall in enumerate(recalls):
        cutoffs.append((recall, {part: each.cutoffs[number] for part, each in fitted.items()}))
    readings = []
    for asked_for, of_parts in cutoffs:
        predicted = Predicted(fitted, of_parts)
        asked = "a probability of one half" if asked_for is None else f"a recall of {asked_for:g}"
        with model.changed_by_inputs(predicted):
            what = f"reading with predicted neurons, {asked}"
            cross_entropy = cross_entropy_of(model.language_model, windows, what)
        layers: dict[int, Hits] = {}
        for of_rank in model.gathered(predicted.hits):
            for part, hits in of_rank.items():
                layers.setdefault(part.layer, Hits()).add(hits)
        readings.append(PredictedReading(asked_for, cross_entropy, dict(sorted(layers.items()))))
    return readings


def _weights(fitted: Mapping[Part, Fitted]) -> dict[str, Tensor]:
    """What is written: of every feed-forward both weights and its cut-offs, on the CPU."""
    found = {}
    for part, each in fitted.items():
        for name, weight in each.predictor.state_dict().items():
            found[f"{_name(part)}.{name}"] = weight.cpu().contiguous()
        found[f"{_name(part)}.cutoffs"] = torch.tensor(each.cutoffs)
    return found


def _training(model: NeuronModel, fitted: Mapping[Part, Fitted]) -> dict[str, dict[str, Any]]:
    """What is to be said of every feed-forward, by its name."""
    rows = {}
    for each in model.feed_forwards:
        name, found = _name(each.part), fitted.get(each.part)
        rows[name] = {
            "name": name,
            "layer": each.part.layer,
            "neurons": each.neurons,
            "parameters": 3 * each.width * each.neurons,
            "predictor_parameters": 0,
            "tokens": 0,
        }
        if found is not None:
            rows[name] |= {
                "predictor_parameters": sum(weight.numel() for weight in found.predictor.parameters()),
                "tokens": found.tokens,
                "epochs": found.epochs,
                "kept_back_loss": found.loss,
                # A cut-off below every logit computes everything: none of its neurons was active.
                "cutoffs": [value if math.isfinite(value) else None for value in found.cutoffs],
            }
    return rows


def _write(report: PredictorsReport, weights: Mapping[str, Tensor], arguments: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    output = arguments.output
    write_result(output / PREDICTORS_NUMBERS, report.as_json())
    about = {"hidden": str(report.hidden), "recall": json.dumps(arguments.recall), "model": report.model}
    with replaced_durably(output / PREDICTORS_WEIGHTS) as temporary:
        save_file(dict(weights), temporary, metadata=about)
    picture = PredictorsPicture(
        {layer: hits.sparsity for layer, hits in report.readings[0].hits.items()},
        {
            each.name: {layer: hits.predicted_sparsity for layer, hits in each.hits.items()}
            for each in report.readings
        },
        [(each.name, each.overall.predicted_sparsity, each.cross_entropy) for each in report.readings],
        report.readings[0].overall.sparsity,
        report.cross_entropy,
    )
    draw_predictors(picture, output / PREDICTORS_PICTURE)
    print(f"\nnumbers     {output / PREDICTORS_NUMBERS}\npredictors  {output / PREDICTORS_WEIGHTS}")
    print(f"picture     {output / PREDICTORS_PICTURE}")


def _name(part: Part) -> str:
    return f"layers.{part.layer}.{part.name}"


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layers and experts by their numbers."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]
