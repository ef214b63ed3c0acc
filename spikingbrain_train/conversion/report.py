"""What a conversion did, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.submodule_kind import SubmoduleKind
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.storage.checkpoint_folder import CONVERSION_REPORT_FILE

REPORT_FILE = CONVERSION_REPORT_FILE
NEW = "new: "
"""How the origin of parameters begins that the source does not have."""


@dataclass
class Group:
    """Parameters of one kind that came from one place."""

    name: str
    origin: str
    """``copied``, ``copied and scaled by 0.98``, or ``new:`` and how the parameters were initialised."""
    tensors: int = 0
    parameters: int = 0


@dataclass
class ConversionReport:
    """What was copied, what is new, and what it cost."""

    source: str
    output: str
    architecture: str
    """Hugging Face class that was read or written."""
    layers: str
    """Layers of each kind, such as ``14 gla + 14 swa (window 4096)``."""
    dry_run: bool
    groups: list[Group] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    """Source tensors that hold nothing of their own, and why they were left out."""
    notes: list[str] = field(default_factory=list)
    checked: str = ""
    """How all tensors of the source were accounted for."""
    needs: list[str] = field(default_factory=list)
    """What a dry run says that it will take: ``disk: ...``, ``memory: ...``, ``time: ...``."""
    bytes: int = 0
    seconds: float = 0.0
    """Not in the file: a conversion that was stopped and gone on with writes the same bytes."""

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
        return sum(group.parameters for group in self.groups if group.origin.startswith(NEW))

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
            f"{self.architecture}, {self.layers} layers",
            "",
            lines[0],
            rule,
        ]
        body += [*lines[1:-1], rule, lines[-1], ""]
        body += [f"left out: {entry}" for entry in self.ignored] + [f"note: {note}" for note in self.notes]
        body += [f"checked: {self.checked}"] if self.checked else []
        body += self.needs
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
        del values["seconds"], values["needs"]
        (folder / REPORT_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def describe_layers(model: ModelConfig) -> str:
    """Layers of each mixer and feed-forward: ``14 gla + 14 swa (window 4096)``.

    Or ``24 [gla,swa] (window 4096) + 4 [gla,full]; 7 dense + 21 moe (16 experts, top-1, + 1 shared of width
    1408)``. SwiGLUs of the source go without saying.
    """
    described = layers(model)
    mixers = {layer.mixer_name: layer.mixers for layer in described}
    text = _counts([layer.mixer_name for layer in described], mixers, model)
    kinds = dict.fromkeys(layer.feed_forward for layer in described)
    if all(kind.is_of_the_source and kind.describe(model) is None for kind in kinds):
        return text
    feed_forwards = {layer.feed_forward.name: (layer.feed_forward,) for layer in described}
    return f"{text}; {_counts([layer.feed_forward.name for layer in described], feed_forwards, model)}"


def _counts(names: Sequence[str], kinds: Mapping[str, Sequence[SubmoduleKind]], model: ModelConfig) -> str:
    """How often each name occurs, with what its kinds say of themselves."""
    parts = []
    for name, its_kinds in kinds.items():
        words = [said for kind in its_kinds if (said := kind.describe(model))]
        parts.append(f"{names.count(name)} {name}" + (f" ({', '.join(words)})" if words else ""))
    return " + ".join(parts)
