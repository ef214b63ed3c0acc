"""What a quantisation says: perplexities in one table, errors per layer as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.evaluation.output import write_result
from spikingbrain_train.quantization.request import PICTURE_FILE, REPORT_FILE, QuantizeRequest
from spikingbrain_train.reporting.plots.layer_errors import LayerErrors, draw_layer_errors
from spikingbrain_train.reporting.tables import table


@dataclass(frozen=True)
class Measured:
    """The model at one point of the way."""

    what: str
    cross_entropy: float
    """Nats per token."""

    @property
    def perplexity(self) -> float:
        """exp of the cross entropy."""
        return math.exp(self.cross_entropy)


@dataclass(frozen=True)
class LayerError:
    """Mean over the linears of a layer of what INT8 weights are off by; see calibration.LinearError."""

    layer: int
    plain: float
    gptq: float | None


@dataclass(frozen=True)
class QuantizationReport:
    """All of it."""

    measured: Sequence[Measured]
    """From the model as it is to all that was asked for; empty without held-out data."""
    tokens: int
    layers: Sequence[LayerError]
    linears: Sequence[dict[str, Any]]
    bytes_before: int
    """Of the source folder's tensors."""
    bytes_after: int
    seconds: float

    def describe(self, output: Path) -> str:
        """Lines for a terminal."""
        lines = []
        if self.measured:
            first = self.measured[0].perplexity
            rows = [("", "cross entropy", "perplexity", "rise")]
            for each in self.measured:
                rise = f"{each.perplexity / first - 1:+.2%}" if each is not self.measured[0] else ""
                rows.append((each.what, f"{each.cross_entropy:.4f}", f"{each.perplexity:.3f}", rise))
            lines += [*table(rows, 1), f"on {self.tokens:,} held-out tokens", ""]
        worst = max(self.linears, key=lambda each: _best(each))
        errors = [layer.plain if layer.gptq is None else layer.gptq for layer in self.layers]
        lines += [
            f"error of outputs  {sum(errors) / len(errors):.2%} in the mean of layers, most in "
            f"layer {worst['layer']} {worst['name']}: {_best(worst):.2%}",
        ]
        if self.layers[0].gptq is not None:
            plain = sum(layer.plain for layer in self.layers) / len(self.layers)
            lines += [f"plain rounding    {plain:.2%}"]
        lines += [
            f"size              {self.bytes_after / 1e6:,.1f} MB of {self.bytes_before / 1e6:,.1f} MB "
            f"({self.bytes_after / self.bytes_before:.1%})",
            f"written           {output}, with {REPORT_FILE} and {PICTURE_FILE}",
        ]
        return "\n".join(lines)

    def as_json(self, request: QuantizeRequest) -> dict[str, Any]:
        """For the file."""
        return {
            "measured": [{**asdict(each), "perplexity": each.perplexity} for each in self.measured],
            "tokens": self.tokens,
            "layers": [asdict(each) for each in self.layers],
            "linears": list(self.linears),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": self.seconds,
            "settings": request.settings(),
        }

    def write(self, folder: Path, request: QuantizeRequest) -> None:
        """JSON and picture into a folder."""
        write_result(folder / REPORT_FILE, self.as_json(request))
        draw_layer_errors(
            LayerErrors(
                [each.plain for each in self.layers],
                None if self.layers[0].gptq is None else [each.gptq or 0.0 for each in self.layers],
            ),
            folder / PICTURE_FILE,
        )


def _best(linear: dict[str, Any]) -> float:
    return float(linear["plain"] if linear["gptq"] is None else linear["gptq"])


def layer_errors(linears: Sequence[dict[str, Any]]) -> list[LayerError]:
    """Of every layer the mean over its linears."""
    found = []
    for layer in sorted({each["layer"] for each in linears}):
        here = [each for each in linears if each["layer"] == layer]
        gptq = [each["gptq"] for each in here if each["gptq"] is not None]
        plain = sum(each["plain"] for each in here) / len(here)
        found.append(LayerError(layer, plain, sum(gptq) / len(gptq) if gptq else None))
    return found
