"""What a choice of layers says: a table, JSON, the recipe, a picture."""

from __future__ import annotations

from typing import Any

from spikingbrain_train.evaluation.output import write_result
from spikingbrain_train.layer_choice.measurements import Measurement
from spikingbrain_train.layer_choice.request import PICTURE_FILE, RESULT_FILE, ChoiceRequest
from spikingbrain_train.layer_choice.search import Choice
from spikingbrain_train.reporting.plots.layer_bars import LayerCosts, draw_layer_costs
from spikingbrain_train.reporting.tables import table


def finish_choice(request: ChoiceRequest, choice: Choice) -> str:
    """Write JSON, recipe and picture. Returns the text for the terminal."""
    recipe = request.write_recipe(choice.chosen.swapped)
    write_result(request.output / RESULT_FILE, _result(request, choice))
    costs = LayerCosts(
        {layer: each.kl_divergence for layer, each in choice.singles.items()},
        set(choice.chosen.swapped),
        request.num_layers,
        chosen=choice.chosen.kl_divergence,
        even=choice.even.kl_divergence,
        kept=choice.kept.kl_divergence,
    )
    draw_layer_costs(costs, request.output / PICTURE_FILE)
    return "\n".join([*_lines(choice), "", *_next_steps(request, choice, str(recipe))])


def _lines(choice: Choice) -> list[str]:
    rows = [("swapped", "KL", "cross entropy", "above the source", "")]

    def row(name: str, each: Measurement, mark: str = "") -> None:
        above = each.cross_entropy - choice.source
        rows.append((name, f"{each.kl_divergence:.4f}", f"{each.cross_entropy:.4f}", f"{above:+.4f}", mark))

    rows.append(("source", f"{0:.4f}", f"{choice.source:.4f}", f"{0:+.4f}", ""))
    row("none", choice.kept)
    ranked = sorted(choice.singles.items(), key=lambda item: item[1].kl_divergence)
    for layer, each in ranked:
        row(f"layer {layer}", each, "chosen" if layer in choice.chosen.swapped else "")
    number = len(choice.chosen.swapped)
    row(f"{number} evenly spaced", choice.even)
    row(f"{number} chosen", choice.chosen)
    return table(rows, 1)


def _next_steps(request: ChoiceRequest, choice: Choice, recipe: str) -> list[str]:
    chosen = ", ".join(map(str, choice.chosen.swapped))
    return [
        f"swapped        {chosen}",
        f"recipe         {recipe}",
        f"               spikingbrain-convert import --hf ... --output ... --conversion {recipe}",
        f"numbers        {request.output / RESULT_FILE}, drawn in {request.output / PICTURE_FILE}",
    ]


def _result(request: ChoiceRequest, choice: Choice) -> dict[str, Any]:
    def numbers(each: Measurement) -> dict[str, Any]:
        return {
            "swapped": list(each.swapped),
            "kl_divergence": each.kl_divergence,
            "cross_entropy": each.cross_entropy,
            "above_the_source": each.cross_entropy - choice.source,
        }

    return {
        "mixers": request.pair.mixers(request.num_layers, choice.chosen.swapped),
        "source": {"cross_entropy": choice.source},
        "kept_only": numbers(choice.kept),
        "chosen": numbers(choice.chosen) | {"order": choice.order},
        "evenly_spaced": numbers(choice.even),
        "layers": {str(layer): numbers(each) for layer, each in sorted(choice.singles.items())},
        "greedy": request.greedy,
        "settings": request.settings(),
    }
