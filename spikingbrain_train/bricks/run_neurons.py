"""From a model with neurons to tables, JSON, the neurons' numbers and a picture."""

from __future__ import annotations

import argparse

from spikingbrain_train.bricks.neuron_model import NeuronModel, strongest
from spikingbrain_train.bricks.neuron_records import BINS, LOWEST, PER_DECADE, NeuronRecords
from spikingbrain_train.bricks.neurons_report import MaskedReading, NeuronsReport
from spikingbrain_train.bricks.output_files import NEURONS_MEANS, NEURONS_NUMBERS, NEURONS_PICTURE
from spikingbrain_train.evaluation.output import write_result
from spikingbrain_train.evaluation.text_windows import cross_entropy_of, windows_asked_for
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.plots.neurons_picture import NeuronsPicture, draw_neurons
from spikingbrain_train.storage.durable_files import replaced_durably


def run(model: NeuronModel, arguments: argparse.Namespace) -> None:
    """Read, count, print and write; on several ranks all call it together, and the main process writes.

    Args:
        model: any form.
        arguments: of ``spikingbrain-bricks neurons``.
    """
    language_model = model.language_model
    with activity("opening the text", shown=language_model.is_main_process):
        windows = windows_asked_for(arguments, language_model)
    records = NeuronRecords()
    with model.changed(records.watch):
        whole = cross_entropy_of(language_model, windows, "reading with all neurons")
    curve = []
    for percent in sorted(set(arguments.mask)):
        cross_entropy = whole
        if percent:
            with model.changed(strongest(percent / 100)):
                what = f"reading without {percent:g} % of the neurons"
                cross_entropy = cross_entropy_of(language_model, windows, what)
        curve.append(MaskedReading(percent, cross_entropy))
    merged = NeuronRecords.merged(model.gathered(records))
    if not language_model.is_main_process:
        return
    report = NeuronsReport(
        model=model.name,
        form=model.form,
        dtype=model.dtype,
        text=" ".join(arguments.text or arguments.data),
        windows=arguments.windows,
        seq_length=arguments.seq_length,
        cross_entropy=whole,
        records=merged,
        curve=curve,
    )
    print("\n".join(report.lines()))
    if arguments.output is None:
        return
    output = arguments.output
    write_result(output / NEURONS_NUMBERS, report.as_json())
    from safetensors.torch import save_file

    with replaced_durably(output / NEURONS_MEANS) as temporary:
        save_file(merged.means(), temporary)
    activations, outputs = report.whole()
    edges = [10 ** (LOWEST + index / PER_DECADE) for index in range(BINS + 1)]
    picture = NeuronsPicture(
        edges,
        {"activation": activations.counts.tolist(), "output norm": outputs.counts.tolist()},
        [(each.percent, each.cross_entropy) for each in curve],
        whole,
    )
    draw_neurons(picture, output / NEURONS_PICTURE)
    print(f"\nnumbers     {output / NEURONS_NUMBERS}\nneurons     {output / NEURONS_MEANS}")
    print(f"picture     {output / NEURONS_PICTURE}")
