"""Steps that count what happens inside a model while it reads text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikingbrain_train.activation_sparsity.result_files import FITTED, NUMBERS_FILE, PICTURE_FILE
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.evaluation.reading_command_line import check_text_options
from spikingbrain_train.pipelines.kinds.kind import Context, dataset
from spikingbrain_train.pipelines.kinds.tools import OnRanks, Result, WritesFolder, files, words


class _Analyzes(OnRanks, WritesFolder):
    """A tool that reads a model and text, and fills a folder with numbers and something to look at."""

    def check_arguments(self, arguments: argparse.Namespace) -> None:
        check_text_options(arguments)

    def written(self) -> dict[str, str]:
        """Output -> file in the folder."""
        raise NotImplementedError

    def result(self, context: Context, given: Mapping[str, Any]) -> Result:
        output = Path(str(given["output"]))
        outputs = {name: output / file for name, file in self.written().items()}
        return Result(
            outputs={name: str(path) for name, path in outputs.items()},
            makes=[output],
            proof=list(outputs.values()),
            reads={
                "model": str(given["model"]),
                **files("text", given.get("text")),
                **dataset("data", words(given.get("data") or [])),
            },
        )


class AnalyzeSpikes(_Analyzes):
    """spikingbrain-analyze-spikes. Outputs: ``result``, a JSON file, and ``page``, an HTML file."""

    name = "analyze_spikes"
    title = "count spikes in front of the projections"
    command = ("analyze-spikes",)

    def parser(self) -> argparse.ArgumentParser:
        from spikingbrain_train.spike_analysis.command_line import analyze_spikes_parser

        return analyze_spikes_parser()

    def written(self) -> dict[str, str]:
        from spikingbrain_train.spike_analysis.command_line import NUMBERS_FILE, PAGE_FILE

        return {"result": NUMBERS_FILE, "page": PAGE_FILE}


class AnalyzeSparsity(_Analyzes):
    """spikingbrain-analyze-sparsity. Outputs: ``result``, a JSON file, and ``picture``, a PNG.

    With ``fit_threshold`` it finds out ``fitted_threshold``, what a conversion or a stage takes for
    ``fatrelu_threshold``; until it has, the published one is assumed.
    """

    name = "analyze_sparsity"
    title = "count what is zero inside the feed-forwards"
    command = ("analyze-sparsity",)

    def parser(self) -> argparse.ArgumentParser:
        from spikingbrain_train.activation_sparsity.command_line import analyze_sparsity_parser

        return analyze_sparsity_parser()

    def check_arguments(self, arguments: argparse.Namespace) -> None:
        from spikingbrain_train.activation_sparsity.command_line import check_thresholds

        super().check_arguments(arguments)
        check_thresholds(arguments)

    def written(self) -> dict[str, str]:
        return {"result": NUMBERS_FILE, "picture": PICTURE_FILE}

    def result(self, context: Context, given: Mapping[str, Any]) -> Result:
        result = super().result(context, given)
        if given.get("fit_threshold"):
            result.assumed = {FITTED: ModelConfig.fatrelu_threshold}
            result.values = Path(result.outputs["result"])
        return result
