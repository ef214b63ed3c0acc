"""What a SpikingBrain2.0 folder holds, and what of it has no place here, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from spikingbrain_train.conversion.formats.sse_swa_moba import ARCHITECTURE, KnownTensor, SpikingBrain2
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader, TensorSpec
from spikingbrain_train.reporting.tables import facts, spans, table, terminal_width
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json
from spikingbrain_train.storage.tokenizer_files import has_tokenizer


@dataclass(frozen=True)
class SpikingBrain2Inspection:
    """A folder held against what its config.json describes."""

    folder: str
    model: SpikingBrain2
    held: list[KnownTensor]
    """Tensors that have a place here, and are in the folder in the right shape."""
    missing: list[KnownTensor]
    """Tensors that have none: what no kind here computes."""
    absent: list[KnownTensor]
    """Tensors that config.json describes and the folder lacks, or holds in another shape."""
    unknown: list[TensorSpec]
    """Tensors that config.json does not describe."""
    has_tokenizer: bool

    def text(self, width: int | None = None) -> str:
        """For a terminal of ``width`` columns; null takes that of this one."""
        rows = [
            *self.model.rows(),
            ("tokenizer:", "yes" if self.has_tokenizer else "no"),
            (
                "import:",
                f"not possible: of {len(self.held) + len(self.missing)} tensors {len(self.missing)} have no "
                f"place here ({_numbers(self.missing):,} of {_numbers(self.held + self.missing):,} numbers)",
            ),
        ]
        title = f"{self.folder}: Hugging Face checkpoint, {ARCHITECTURE} (SpikingBrain2.0)"
        lines = [title, *facts(rows, width or terminal_width())]
        lines += _listed("has a place here", self.held)
        lines += _listed("has none", self.missing)
        lines += _listed(f"in {CONFIG_FILE}, but not in the folder (or in another shape)", self.absent)
        if self.unknown:
            found = [(spec.name, str(list(spec.shape))) for spec in self.unknown]
            header = (f"in the folder, but not in {CONFIG_FILE}", "shape")
            lines += ["", *table([header, *found], left=2)]
        return "\n".join(lines)

    def table(self, pattern: str) -> str:
        """The tensors whose names a pattern of a shell fits, for a terminal, and where they would go."""
        places = [("has a place", self.held), ("has none", self.missing), ("not in the folder", self.absent)]
        rows = [
            (tensor.name, str(list(tensor.shape)), tensor.what, place)
            for place, tensors in places
            for tensor in tensors
            if fnmatchcase(tensor.name, pattern)
        ]
        if not rows:
            return f"no tensor has a name like {pattern}"
        return "\n".join(table([("tensor", "shape", "what it is", "here"), *rows], left=4))

    def values(self) -> dict[str, Any]:
        """For programs: plain values, which JSON takes; every tensor by its whole name."""
        return {
            "folder": self.folder,
            "format": f"Hugging Face checkpoint, {ARCHITECTURE}",
            "importable": False,
            "layers": {
                "full_attention": self.model.full_layers,
                "moba": self.model.moba_layers,
                "sse": self.model.sse_layers,
            },
            "held": [_value(tensor) for tensor in self.held],
            "missing": [_value(tensor) for tensor in self.missing],
            "absent": [_value(tensor) for tensor in self.absent],
            "unknown": [{"name": spec.name, "shape": list(spec.shape)} for spec in self.unknown],
            "has_tokenizer": self.has_tokenizer,
        }


def inspect_spikingbrain2(folder: Path) -> SpikingBrain2Inspection:
    """Hold a SpikingBrain2.0 folder against its config.json, reading headers alone.

    Raises:
        CheckpointError: config.json or the safetensors are malformed or incomplete.
    """
    model = SpikingBrain2.read(load_config_json(folder), folder / CONFIG_FILE)
    specs = SafetensorsReader(folder).specs
    described = list(model.tensors())
    present = [tensor for tensor in described if _fits(specs.get(tensor.name), tensor)]
    names = {tensor.name for tensor in described}
    repeated = {"lm_head.weight"} if model.tied else set()
    return SpikingBrain2Inspection(
        folder=str(folder),
        model=model,
        held=[tensor for tensor in present if tensor.is_held],
        missing=[tensor for tensor in present if not tensor.is_held],
        absent=[tensor for tensor in described if not _fits(specs.get(tensor.name), tensor)],
        unknown=[spec for name, spec in specs.items() if name not in names | repeated],
        has_tokenizer=has_tokenizer(folder),
    )


def _fits(spec: TensorSpec | None, tensor: KnownTensor) -> bool:
    return spec is not None and spec.shape == tensor.shape


def _numbers(tensors: list[KnownTensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors)


def _listed(title: str, tensors: list[KnownTensor]) -> list[str]:
    """A row for every name, with the layers that have it."""
    if not tensors:
        return []
    rows: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for tensor in tensors:
        layers = rows.setdefault((tensor.pattern, tensor.shape, tensor.what), [])
        if tensor.layer is not None:
            layers.append(tensor.layer)
    found = [
        (pattern.replace("{layer}", "N"), str(list(shape)), what, spans(layers))
        for (pattern, shape, what), layers in rows.items()
    ]
    return ["", *table([(title, "shape", "what it is", "layers N"), *found], left=4)]


def _value(tensor: KnownTensor) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "what": tensor.what}
