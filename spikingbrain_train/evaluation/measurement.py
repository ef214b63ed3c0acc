"""What spikingbrain-evaluate measures of a model beside its cross entropy: each a part of the one report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain_train.evaluation.output import write_result
from spikingbrain_train.reporting.plots.evaluation_picture import draw_reports
from spikingbrain_train.reporting.plots.evaluation_report import Report

if TYPE_CHECKING:
    from spikingbrain_train.evaluation.language_model import LanguageModel
    from spikingbrain_train.parallel.process_groups import ProcessGroups


@dataclass(frozen=True)
class Part:
    """What was found."""

    key: str
    """In the report."""
    numbers: Mapping[str, Any]
    """As JSON keeps them."""
    text: str
    """For a terminal."""


class Measurement(ABC):
    """Made of the command line, without torch. All ranks call its methods together."""

    def prepare(self, groups: ProcessGroups | None) -> None:  # noqa: B027  (most need nothing)
        """Do what has to be done before the model is in memory.

        Args:
            groups: of the ranks that will hold it; None for a Hugging Face folder.
        """

    @abstractmethod
    def measure(self, model: LanguageModel) -> Part:
        """Ask the model; every rank gets the result."""


def finish_report(
    numbers: Mapping[str, Any], parts: Sequence[Part], *, output: Path | None, picture: Path | None
) -> None:
    """Print what was found, write the report and draw it; on the main process alone.

    Args:
        numbers: of the report beside its parts.
        parts: that were measured.
        output: file of the report.
        picture: file of the picture.
    """
    report = {**numbers, **{part.key: part.numbers for part in parts}}
    for part in parts:
        print(f"\n{part.text}")
    if output is not None:
        write_result(output, report)
    if picture is not None:
        draw_reports([Report.of(report, str(numbers["model"]))], picture, "--plot")
        print(f"\n{picture}")
