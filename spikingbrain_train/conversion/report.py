"""What a conversion did, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spikingbrain_train.config.model import Mixer, ModelConfig

REPORT_FILE = "conversion_report.json"


@dataclass
class Group:
    """Parameters of one kind that came from one place."""

    name: str
    origin: str
    """``copied``, or how new parameters were initialised."""
    tensors: int = 0
    parameters: int = 0


@dataclass
class ConversionReport:
    """What was copied, what is new, and what it cost."""

    source: str
    output: str
    architecture: str
    """Hugging Face class that was read or written."""
    mixers: str
    """Layers of each mixer, such as ``14 gla + 14 swa``."""
    dry_run: bool
    groups: list[Group] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    """Source tensors that hold nothing of their own, and why they were left out."""
    notes: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    def count(self, group: str, origin: str, parameters: int) -> None:
        """Add one tensor."""
        for entry in self.groups:
            if (entry.name, entry.origin) == (group, origin):
                break
        else:
            entry = Group(group, origin)
            self.groups.append(entry)
        entry.tensors += 1
        entry.parameters += parameters

    @property
    def parameters(self) -> int:
        """All parameters of the result."""
        return sum(group.parameters for group in self.groups)

    @property
    def new_parameters(self) -> int:
        """Parameters that the source did not have."""
        return sum(group.parameters for group in self.groups if group.origin != "copied")

    def table(self) -> str:
        """The report for a terminal."""
        rows = [("parameters", "tensors", "number", "origin")]
        rows += [(g.name, str(g.tensors), f"{g.parameters:,}", g.origin) for g in self.groups]
        rows.append(
            ("total", str(sum(g.tensors for g in self.groups)), f"{self.parameters:,}", self._share())
        )
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows]
        rule = "-" * max(map(len, lines))
        body = [
            f"{self.source} -> {self.output}",
            f"{self.architecture}, {self.mixers} layers",
            "",
            lines[0],
            rule,
        ]
        body += [*lines[1:-1], rule, lines[-1], ""]
        body += [f"left out: {entry}" for entry in self.ignored] + [f"note: {note}" for note in self.notes]
        verb = "would write" if self.dry_run else "wrote"
        body.append(
            f"{verb} {self.bytes / 1e6:,.1f} MB" + ("" if self.dry_run else f" in {self.seconds:.1f} s")
        )
        return "\n".join(body)

    def _share(self) -> str:
        return (
            f"{100 * self.new_parameters / self.parameters:.3g} % new"
            if self.new_parameters
            else "all copied"
        )

    def save(self, folder: Path) -> None:
        """Write ``conversion_report.json`` into ``folder``."""
        values = asdict(self) | {"parameters": self.parameters, "new_parameters": self.new_parameters}
        (folder / REPORT_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def describe_mixers(model: ModelConfig) -> str:
    """Layers of each mixer: ``14 gla + 14 swa (window 4096)``."""
    layers = model.layer_mixers()
    window = {Mixer.swa: f" (window {model.sliding_window})"}
    return " + ".join(
        f"{layers.count(mixer)} {mixer.value}{window.get(mixer, '')}" for mixer in dict.fromkeys(layers)
    )
