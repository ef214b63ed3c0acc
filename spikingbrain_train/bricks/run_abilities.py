"""From a model and labelled texts to tables, JSON, the abilities' neurons and a picture."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from spikingbrain_train.bricks.abilities import Abilities, measure_abilities
from spikingbrain_train.bricks.neuron_model import NeuronModel
from spikingbrain_train.bricks.output_files import ABILITIES_NEURONS, ABILITIES_NUMBERS, ABILITIES_PICTURE
from spikingbrain_train.evaluation.output import write_result
from spikingbrain_train.evaluation.text_windows import windows_of_text
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.plots.ability_picture import AbilityPicture, draw_abilities
from spikingbrain_train.reporting.tables import facts, table, terminal_width
from spikingbrain_train.storage.durable_files import replaced_durably


def run(model: NeuronModel, arguments: argparse.Namespace) -> None:
    """Score, prune, read, print and write; on several ranks all call it together.

    Args:
        model: any form.
        arguments: of ``spikingbrain-bricks abilities``.
    """
    language_model, half = model.language_model, arguments.windows // 2
    texts = {}
    with activity("opening the texts", shown=language_model.is_main_process):
        for name, file in arguments.texts.items():
            windows = windows_of_text(
                [file],
                arguments.text_key,
                language_model.tokenizer,
                arguments.windows,
                arguments.seq_length,
                "--texts",
            )
            texts[name] = (windows[:half], windows[half:])
    found, neurons = measure_abilities(model, texts, arguments.prune / 100)
    if not language_model.is_main_process:
        return
    print("\n".join(_lines(model, arguments, found)))
    if arguments.output is None:
        return
    output = arguments.output
    write_result(output / ABILITIES_NUMBERS, _as_json(model, arguments, found))
    from safetensors.torch import save_file

    with replaced_durably(output / ABILITIES_NEURONS) as temporary:
        save_file(
            {
                f"{ability}.layers.{layer}.{name}": mask.to(torch.uint8)
                for ability, masks in neurons.items()
                for (layer, name), mask in masks.items()
            },
            temporary,
        )
    draw_abilities(AbilityPicture(found.names, found.damage, found.overlap), output / ABILITIES_PICTURE)
    print(f"\nnumbers     {output / ABILITIES_NUMBERS}\nneurons     {output / ABILITIES_NEURONS}")
    print(f"picture     {output / ABILITIES_PICTURE}")


def _as_json(model: NeuronModel, arguments: argparse.Namespace, found: Abilities) -> dict[str, Any]:
    return {
        "model": model.name,
        "form": model.form,
        "dtype": model.dtype,
        "texts": arguments.texts,
        "windows": arguments.windows,
        "seq_length": arguments.seq_length,
        "pruned_percent": arguments.prune,
        "abilities": list(found.names),
        "cross_entropy": list(found.whole),
        "cross_entropy_without": [list(row) for row in found.pruned],
        "cross_entropy_without_random": list(found.random),
        "perplexity_ratio": [[math.exp(value) for value in row] for row in found.damage],
        "own_hit_worst": found.own_hit_worst,
        "overlap": [list(row) for row in found.overlap],
        "neurons": found.neurons,
        "resident": found.resident,
    }


def _lines(model: NeuronModel, arguments: argparse.Namespace, found: Abilities) -> list[str]:
    number = len(found.names)
    lines = facts(
        [
            ("model", f"{model.name} ({model.form}, {model.dtype})"),
            (
                "texts",
                f"{number} of {arguments.windows} windows of {arguments.seq_length} tokens, half to score on",
            ),
            ("pruned", f"{arguments.prune:g} % of every feed-forward, of {found.neurons:,} neurons in all"),
            (
                "resident",
                f"{found.resident:,} neurons are among the busiest {arguments.prune:g} % of every text",
            ),
            ("worst hit", f"the own ability in {found.own_hit_worst} of {number} rows"),
        ],
        terminal_width(),
    )
    rows = [["cross entropy, nats", *found.names]]
    rows.append(["whole model", *(f"{value:.4f}" for value in found.whole)])
    for name, row in zip(found.names, found.damage, strict=True):
        rows.append([f"without {name}", *(f"{value:+.4f}" for value in row)])
    more = (value - of for value, of in zip(found.random, found.whole, strict=True))
    rows.append(["without random ones", *(f"{value:+.4f}" for value in more)])
    lines += ["", *table(rows, 1)]
    rows = [["overlap (Jaccard)", *found.names]]
    for name, shares in zip(found.names, found.overlap, strict=True):
        rows.append([name, *(f"{value:.3f}" for value in shares)])
    return [*lines, "", *table(rows, 1)]
