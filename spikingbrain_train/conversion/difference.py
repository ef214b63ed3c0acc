"""How two checkpoints differ, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikingbrain_train.conversion.stored_weights import (
    HfWeights,
    MegatronWeights,
    Stored,
    StoredWeights,
    open_weights,
    side_by_side,
)
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.tables import table

_BLOCK = 1 << 24  # numbers that are compared at a time: 64 MB in float32


class Verdict(str, Enum):
    """What is said of a tensor."""

    equal = "equal"
    """The same shape and numbers; without a tolerance also the same number format."""
    differs = "differs"
    """Numbers differ, or the number format does."""
    shape = "shape differs"
    only_a = "only in A"
    only_b = "only in B"


_COUNTED = {
    Verdict.equal: "equal",
    Verdict.differs: "differ",
    Verdict.shape: "of other shapes",
    Verdict.only_a: "only in A",
    Verdict.only_b: "only in B",
}


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of two checkpoints."""

    name: str
    verdict: Verdict
    shapes: tuple[list[int] | None, list[int] | None]
    dtypes: tuple[str | None, str | None]
    largest: float | None = None
    """max |a - b|, over places where both are finite."""
    relative: float | None = None
    """||a - b|| / ||a||; infinite where a is all zeros."""
    not_finite: int = 0
    """Places where one holds NaN or an infinity that the other does not."""

    @property
    def order(self) -> tuple[int, float, float, str]:
        """Sorts the worst first: what is missing, other shapes, then by relative difference."""
        ranks = (Verdict.only_a, Verdict.only_b, Verdict.shape, Verdict.differs, Verdict.equal)
        worst = -math.inf if self.not_finite else -(self.relative or 0.0)
        return ranks.index(self.verdict), worst, -(self.largest or 0.0), self.name


@dataclass
class Difference:
    """Two checkpoints, held side by side."""

    a: str
    b: str
    kinds: tuple[str, str]
    tensors: list[TensorDifference]
    """The worst first."""
    settings: dict[str, tuple[str | None, str | None]]
    """Settings of the architecture that differ, with both values."""
    notes: list[str] = field(default_factory=list)

    @property
    def differ(self) -> bool:
        """Whether they are not the same."""
        return bool(self.settings) or any(each.verdict is not Verdict.equal for each in self.tensors)

    def count(self, verdict: Verdict) -> int:
        """How many tensors are of a verdict."""
        return sum(each.verdict is verdict for each in self.tensors)

    def text(self, most: int | None) -> str:
        """For a terminal, with at most so many tensors; None is all that differ."""
        lines = [f"A: {self.a} ({self.kinds[0]})", f"B: {self.b} ({self.kinds[1]})"]
        if self.settings:
            values = [(name, a or "-", b or "-") for name, (a, b) in self.settings.items()]
            lines += ["", *table([("setting", "A", "B"), *values], left=3)]
        found = [each for each in self.tensors if each.verdict is not Verdict.equal]
        if found:
            header = ("tensor", "shape", "max |a-b|", "relative")
            lines += ["", *table([header, *(_row(each) for each in found[:most])], left=2)]
            if most is not None and len(found) > most:
                lines.append(f"... and {len(found) - most} more; --top 0 lists them all")
        counts = [f"{number} {words}" for v, words in _COUNTED.items() if (number := self.count(v))]
        said = ", ".join(counts) or "none"
        lines += ["", *(f"note: {note}" for note in self.notes), f"{len(self.tensors)} tensors: {said}"]
        return "\n".join(lines if self.differ else [*lines[:2], *lines[3:]])

    def values(self) -> dict[str, Any]:
        """For programs: plain values, which JSON takes; numbers that are not finite are null."""
        tensors = [
            asdict(each) | {"largest": _finite(each.largest), "relative": _finite(each.relative)}
            for each in self.tensors
        ]
        return {
            "a": self.a,
            "b": self.b,
            "kinds": list(self.kinds),
            "differ": self.differ,
            "settings": {name: list(values) for name, values in self.settings.items()},
            "notes": self.notes,
            "tensors": tensors,
        }


def diff_checkpoints(
    a: Path, b: Path, *, tolerance: float | None = None, with_training: bool = False, progress: bool = False
) -> Difference:
    """Hold two checkpoints side by side, of one form or one of each.

    Tensors are read one by one. Where one folder is Megatron's and the other Hugging Face's, the names are
    those of the latter, and tensors that only complete its format (a copied output layer, zero biases) do not
    count. The padding of a vocabulary never counts.

    Args:
        a: Hugging Face folder, run folder (its newest checkpoint is taken), or one ``iter_*`` folder.
        b: the same.
        tolerance: relative difference up to which numbers, whatever their format, count as equal; None asks
            for the same bits.
        with_training: compare optimizer and other state of training too, of two Megatron checkpoints.
        progress: say on standard error how far it is.

    Raises:
        CheckpointError: one is missing, incomplete or damaged.
    """
    opened = [open_weights(path, name, with_training=with_training) for path, name in ((a, "A"), (b, "B"))]
    first, second = side_by_side(opened)
    notes = []
    if not with_training and any(isinstance(each, MegatronWeights) and each.has_training for each in opened):
        notes.append("only weights are compared; --training adds optimizer and other state of training")
    if any(isinstance(each, HfWeights) and each.is_packed for each in opened):
        notes.append(
            "packed ternary weights are numbers times their scale; beside them a Megatron checkpoint's "
            "parameters are what they are rounded to"
        )
    total = sum(
        torch.Size(stored.shape).numel() for name, stored in first.tensors.items() if name in second.tensors
    )
    with activity("comparing", total, "numbers", shown=progress) as done:
        tensors = []
        for name in [*first.tensors, *(name for name in second.tensors if name not in first.tensors)]:
            tensors.append(_compare(name, first, second, tolerance))
            if name in first.tensors and name in second.tensors:
                done.advance(torch.Size(first.tensors[name].shape).numel())
    return Difference(
        a=str(first.folder),
        b=str(second.folder),
        kinds=(first.kind, second.kind),
        tensors=sorted(tensors, key=lambda each: each.order),
        settings=_settings(first, second),
        notes=notes,
    )


def _settings(first: StoredWeights, second: StoredWeights) -> dict[str, tuple[str | None, str | None]]:
    a, b = first.settings(), second.settings()
    return {
        name: (a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)
    }


def _compare(
    name: str, first: StoredWeights, second: StoredWeights, tolerance: float | None
) -> TensorDifference:
    a, b = first.tensors.get(name), second.tensors.get(name)
    shapes = (_shape(a), _shape(b))
    dtypes = (_dtype(a), _dtype(b))
    if a is None or b is None:
        return TensorDifference(name, Verdict.only_b if a is None else Verdict.only_a, shapes, dtypes)
    if a.shape != b.shape:
        return TensorDifference(name, Verdict.shape, shapes, dtypes)
    found = Distance()
    for part in first.parts(name):
        found.add(first.read_part(name, part), second.read_part(name, part))
    exact = found.largest == 0 and a.dtype is b.dtype
    same = exact if tolerance is None else found.relative <= tolerance
    verdict = Verdict.equal if same and not found.not_finite else Verdict.differs
    return TensorDifference(name, verdict, shapes, dtypes, found.largest, found.relative, found.not_finite)


class Distance:
    """How far two tensors are apart, part by part; memory holds little beside the parts."""

    def __init__(self) -> None:
        self.largest = 0.0
        """max |a - b|, over places where both are finite."""
        self.not_finite = 0
        """Places where one is NaN or infinite and the other is not, or not so; NaN and NaN are equal."""
        self._of_difference = self._of_a = 0.0

    @property
    def relative(self) -> float:
        """||a - b|| / ||a||; infinite where a is zeros and b is not."""
        if self._of_difference == 0:
            return 0.0
        return math.sqrt(self._of_difference / self._of_a) if self._of_a else math.inf

    def add(self, a: Tensor, b: Tensor) -> None:
        """Count two parts of the same shape, of any number formats, on CPU."""
        if a.dtype is b.dtype and torch.equal(a, b):  # most are, and this takes one pass
            norm = float(torch.linalg.vector_norm(a.float()))
            if math.isfinite(norm):
                self._of_a += norm**2
                return
        for x, y in _blocks(a, b):
            odd = ~(x.isfinite() & y.isfinite())
            if odd.any():
                same = (x == y) | (x.isnan() & y.isnan())
                self.not_finite += int((odd & ~same).sum())
                x, y = x[~odd], y[~odd]
            if x.numel():
                apart = x - y
                self.largest = max(self.largest, float(apart.abs().max()))
                self._of_difference += float(apart.double().square().sum())
                self._of_a += float(x.double().square().sum())


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    left, right = a.reshape(-1), b.reshape(-1)
    for start in range(0, left.numel(), _BLOCK):
        x, y = left[start : start + _BLOCK], right[start : start + _BLOCK]
        wide = torch.float32 if max(x.dtype.itemsize, y.dtype.itemsize) < 4 else torch.float64
        yield x.to(wide), y.to(wide)


def _shape(stored: Stored | None) -> list[int] | None:
    return None if stored is None else list(stored.shape)


def _dtype(stored: Stored | None) -> str | None:
    return None if stored is None else str(stored.dtype).removeprefix("torch.")


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _row(each: TensorDifference) -> tuple[str, str, str, str]:
    a, b = each.shapes
    shape = str(a or b) if a is None or b is None or a == b else f"{a} | {b}"
    if each.dtypes[0] != each.dtypes[1] and None not in each.dtypes:
        shape += f" {each.dtypes[0]} | {each.dtypes[1]}"
    if each.largest is None or each.relative is None:
        return each.name, shape, each.verdict.value, ""
    if each.not_finite:
        return each.name, shape, f"{each.largest:.3g}", f"{each.not_finite} not finite"
    return each.name, shape, f"{each.largest:.3g}", f"{each.relative:.3g}"
