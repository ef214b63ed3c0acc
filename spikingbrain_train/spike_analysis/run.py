"""From a model that can spike to tables, JSON and a page."""

from __future__ import annotations

import argparse

from spikingbrain_train.evaluation.output import write_result
from spikingbrain_train.evaluation.text_windows import windows_asked_for
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.spike_analysis.analysis import analyse
from spikingbrain_train.spike_analysis.html_page import html_page
from spikingbrain_train.spike_analysis.report import Read, SpikeReport
from spikingbrain_train.spike_analysis.spiking_model import SpikingModel
from spikingbrain_train.storage.durable_files import write_text_durably

_DEFAULT_K = 3.0


def run(
    model: SpikingModel, arguments: argparse.Namespace, *, form: str, dtype: str, json: str, page: str
) -> None:
    """Read, count, print and write; on several ranks all call it together, and the main process writes.

    Args:
        model: any form.
        arguments: of spikingbrain-analyze-spikes.
        form: of the model, for the report.
        dtype: of its weights and activations.
        json: name of that file in ``--output``.
        page: name of the HTML file.
    """
    language_model = model.language_model
    with activity("opening the text", shown=language_model.is_main_process):
        windows = windows_asked_for(arguments, language_model)
    k = arguments.k if arguments.k is not None else model.k or _DEFAULT_K
    analysis = analyse(model, windows, [k, *arguments.sweep])
    if not language_model.is_main_process:
        return
    read = Read(
        model=model.name,
        form=form,
        dtype=dtype,
        trained_k=model.k,
        text=" ".join(arguments.text or arguments.data),
        tokens=arguments.windows * arguments.seq_length,
        windows=arguments.windows,
        seq_length=arguments.seq_length,
    )
    with activity("working out the numbers"):
        report = SpikeReport.of(read, analysis, k, arguments.window, arguments.energy)
    print("\n".join(report.lines()))
    if arguments.output is not None:
        write_result(arguments.output / json, report.as_json())
        write_text_durably(arguments.output / page, html_page(report))
        print(f"\nnumbers        {arguments.output / json}\nreport         {arguments.output / page}")
