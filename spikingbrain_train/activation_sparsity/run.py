"""From a model with gates to tables, JSON and a picture."""

from __future__ import annotations

import argparse

from spikingbrain_train.activation_sparsity.analysis import Readings
from spikingbrain_train.activation_sparsity.gated_model import GatedModel
from spikingbrain_train.activation_sparsity.report import Read, SparsityReport
from spikingbrain_train.evaluation.output import write_result
from spikingbrain_train.evaluation.text_windows import windows_asked_for
from spikingbrain_train.reporting.activity import activity


def run(
    model: GatedModel,
    arguments: argparse.Namespace,
    *,
    form: str,
    is_checkpoint: bool,
    dtype: str,
    json: str,
    picture: str,
) -> None:
    """Read, count, print and write; on several ranks all call it together, and the main process writes.

    Args:
        model: any form.
        arguments: of spikingbrain-analyze-sparsity.
        form: of the model, for the report.
        is_checkpoint: whether it is a Megatron checkpoint.
        dtype: of its weights and activations.
        json: name of that file in ``--output``.
        picture: name of the picture there.
    """
    language_model = model.language_model
    with activity("opening the text", shown=language_model.is_main_process):
        windows = windows_asked_for(arguments, language_model)
    readings = Readings(model, windows)
    own = readings.own
    for threshold in arguments.thresholds:
        readings.at(threshold)
    fit = readings.fit(arguments.loss_budget) if arguments.fit_threshold else None
    if not language_model.is_main_process:
        return
    read = Read(
        model=model.name,
        given=str(arguments.model),
        form=form,
        is_checkpoint=is_checkpoint,
        dtype=dtype,
        text=" ".join(arguments.text or arguments.data),
        tokens=arguments.windows * arguments.seq_length,
        windows=arguments.windows,
        seq_length=arguments.seq_length,
    )
    report = SparsityReport(read, own, readings.all, fit)
    print("\n".join(report.lines()))
    if arguments.output is not None:
        write_result(arguments.output / json, report.as_json())
        from spikingbrain_train.reporting.plots.sparsity_picture import SparsityPicture, draw_sparsity

        layers = {layer: 1 - each.active / each.computed for layer, each in own.records.layers().items()}
        curve = [(each.threshold, each.records.sparsity, each.cross_entropy) for each in readings.all]
        fitted = None if fit is None else fit.threshold
        drawn = SparsityPicture(layers, own.records.sparsity, own.threshold, curve, fitted)
        draw_sparsity(drawn, arguments.output / picture)
        print(f"\nnumbers        {arguments.output / json}\npicture        {arguments.output / picture}")
