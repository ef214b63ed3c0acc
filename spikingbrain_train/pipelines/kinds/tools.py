"""Steps that run a tool of this project: their settings are the flags that its own parser knows."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.layer_choice.request import RECIPE_FILE, RESULT_FILE
from spikingbrain_train.pipelines.kinds.kind import Context, StepKind, dataset, given_ranks, stamp
from spikingbrain_train.pipelines.steps import Step, own_command
from spikingbrain_train.storage.checkpoint_folder import LATEST_ITERATION_FILE
from spikingbrain_train.storage.index_format import DOMAINS_SUFFIX
from spikingbrain_train.storage.loss_mask_format import LOSS_MASK_SUFFIX


@dataclass
class Result:
    """What a tool makes of its settings, and what it reads."""

    outputs: dict[str, str]
    makes: list[Path]
    proof: list[Path]
    reads: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    assumed: dict[str, Any] = field(default_factory=dict)
    """As those of :class:`Step`, with ``values``."""
    values: Path | None = None
    recipe: ConversionConfig | None = None
    """As that of :class:`Step`."""


class Tool(StepKind):
    """A tool of this project. ``--seq-length 512`` is the setting ``seq_length: 512``."""

    command: tuple[str, ...]
    """Its name, and what comes before the flags."""

    @abstractmethod
    def parser(self) -> argparse.ArgumentParser:
        """The tool's own parser."""

    @abstractmethod
    def result(self, context: Context, given: Mapping[str, Any]) -> Result:
        """What the tool makes and reads.

        Args:
            context: where the step stands.
            given: the settings, with :meth:`defaults` among them.

        Raises:
            SpikingBrainError: what the tool would refuse later.
        """

    def defaults(self, context: Context) -> dict[str, Any]:
        """Settings that a step need not give here, although the tool wants them."""
        return {}

    def check_arguments(self, arguments: argparse.Namespace) -> None:
        """What the tool refuses of flags that its parser takes, and would say when its turn comes only.

        Raises:
            ConfigurationError: naming the flag.
        """

    def launcher(self, context: Context, given: Mapping[str, Any]) -> list[str]:
        """Flags in front of the tool's own that its parser does not know."""
        return []

    def settings(self) -> Mapping[str, bool]:
        assumed = self.defaults(Context("", Path(), {}))
        return {
            name: action.required and action.nargs != "*" and name not in assumed
            for name, action in _flags(type(self)).items()
        }

    def plan(self, context: Context, given: Mapping[str, Any]) -> Step:
        settings = {**given, **{k: v for k, v in self.defaults(context).items() if given.get(k) is None}}
        arguments = self._arguments(settings)
        if all(context.is_known(argument) for argument in arguments):
            self.check_arguments(_parsed(self.parser(), arguments))
        result = self.result(context, settings)
        given_files = [path for path in result.reads.values() if context.maker(path) is None]
        return Step(
            context.name,
            self.title,
            [*own_command(*self.command), *self.launcher(context, given), *arguments],
            outputs=result.outputs,
            makes=result.makes,
            proof=result.proof,
            reads=result.reads,
            fingerprint=result.fingerprint + stamp(given_files),
            assumed=result.assumed,
            values=result.values,
            recipe=result.recipe,
        )

    def _arguments(self, given: Mapping[str, Any]) -> list[str]:
        flags = _flags(type(self))
        named, bare = [], []
        for name, value in given.items():
            action = flags.get(name)
            if action is None or value is None or (value == [] and action.nargs != "*"):
                continue
            takes_list = action.nargs in ("+", "*")
            if isinstance(value, Mapping) or (isinstance(value, list) and not takes_list):
                raise ConfigurationError(f"{name} takes one value, not {value}")
            texts = [_text(item) for item in (value if isinstance(value, list) else [value])]
            if not action.option_strings:
                bare += texts
            elif action.nargs == 0:
                if not isinstance(value, bool):
                    raise ConfigurationError(f"{name}={value} does not fit: {name} takes true or false")
                named += [action.option_strings[-1]] if value else []
            elif not takes_list and texts[0].startswith("-"):
                named.append(f"{action.option_strings[-1]}={texts[0]}")
            else:
                named += [action.option_strings[-1], *texts]
        return [*named, *bare]


@cache
def _flags(tool: type[Tool]) -> dict[str, argparse.Action]:
    """Setting -> what the parser knows of it; ``--dry-run`` and ``--help`` write nothing."""
    flags = {}
    for action in tool().parser()._actions:
        name = (action.option_strings[-1].lstrip("-") if action.option_strings else action.dest).replace(
            "-", "_"
        )
        if name not in ("help", "dry_run"):
            flags[name] = action
    return flags


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The arguments as the tool will have them. Raises ConfigurationError with what the parser says."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(arguments)
    except SystemExit:
        raise ConfigurationError(said.getvalue().strip().rpartition("error: ")[2]) from None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def words(value: Any) -> list[str]:
    """One value, or a list of them, as texts."""
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def files(setting: str, value: Any) -> dict[str, str]:
    """Those of a list of texts that are files, by their settings."""
    from spikingbrain_train.data.documents import PYDOC_TOPICS

    texts = enumerate(words(value or []))
    return {f"{setting}[{number}]": path for number, path in texts if path != PYDOC_TOPICS}


class WritesFolder(Tool):
    """A tool whose output is a folder, named after the step where nothing else is said."""

    def defaults(self, context: Context) -> dict[str, Any]:
        return {"output": str(context.output / context.name)}


class OnRanks(Tool):
    """A tool that ``nproc_per_node`` starts on that many ranks, over which ``parallel`` spreads a model."""

    def settings(self) -> Mapping[str, bool]:
        return {**super().settings(), "nproc_per_node": False}

    def launcher(self, context: Context, given: Mapping[str, Any]) -> list[str]:
        ranks = given_ranks(context, given)
        layout = words(given.get("parallel") or [])
        if layout and all(context.is_known(word) for word in layout):
            from spikingbrain_train.evaluation.checkpoint_request import parallel_of
            from spikingbrain_train.planning.parallel_checks import check_world_size

            check_world_size(parallel_of(layout), ranks or 1)
        return [] if ranks is None else ["--nproc-per-node", str(ranks)]


class Preprocess(Tool):
    """spikingbrain-preprocess.

    Outputs: ``train`` and ``valid``, prefixes of datasets; where nothing is held out both are the whole text.
    """

    name = "preprocess"
    title = "tokenize text"
    command = ("preprocess",)

    def parser(self) -> argparse.ArgumentParser:
        from spikingbrain_train.data.command_line import preprocess_parser

        return preprocess_parser()

    def defaults(self, context: Context) -> dict[str, Any]:
        return {"output_prefix": str(context.output / context.name / "text")}

    def result(self, context: Context, given: Mapping[str, Any]) -> Result:
        prefix = str(given["output_prefix"])
        parts = {"train": f"{prefix}_train", "valid": f"{prefix}_valid"}
        if not any(given.get(name) for name in ("valid_fraction", "valid_tokens", "valid_token_fraction")):
            parts = {"train": prefix, "valid": prefix}
        ends = (".bin", ".idx", ".json", LOSS_MASK_SUFFIX, DOMAINS_SUFFIX)  # the last two of some texts only
        made = sorted({Path(f"{part}{end}") for part in parts.values() for end in ends})
        reads = files("input", given["input"])
        return Result(
            outputs=parts,
            makes=made,
            proof=[path for path in made if path.suffix == ".json"],
            reads={**reads, "tokenizer": str(given["tokenizer"])},
        )


class ChooseLayers(OnRanks, WritesFolder):
    """spikingbrain-choose-layers.

    Outputs: ``conversion``, the recipe that a ``convert`` step takes, and ``result``, a JSON file.
    """

    name = "choose_layers"
    title = "choose the layers to swap"
    command = ("choose-layers",)

    def parser(self) -> argparse.ArgumentParser:
        from spikingbrain_train.layer_choice.command_line import choose_layers_parser

        return choose_layers_parser()

    def result(self, context: Context, given: Mapping[str, Any]) -> Result:
        output = Path(str(given["output"]))
        recipe, numbers = output / RECIPE_FILE, output / RESULT_FILE
        reads = {"model": str(given["model"]), **dataset("data", words(given["data"]))}
        if given.get("aligned") is not None:
            reads["aligned"] = str(given["aligned"])
        reads |= dataset("calibration_data", words(given.get("calibration_data") or []))
        return Result(
            outputs={"conversion": str(recipe), "result": str(numbers)},
            makes=[output],
            proof=[recipe, numbers],
            reads=reads,
        )


class Convert(WritesFolder):
    """``spikingbrain-convert import``. Output: ``checkpoint``, a folder that spikingbrain-train loads."""

    name = "convert"
    title = "convert a Hugging Face model to Megatron's format"
    command = ("convert", "import")

    def parser(self) -> argparse.ArgumentParser:
        from spikingbrain_train.conversion.import_command_line import import_parser

        return import_parser()

    def result(self, context: Context, given: Mapping[str, Any]) -> Result:
        output, conversion = Path(str(given["output"])), given.get("conversion")
        reads = {"hf": str(given["hf"])}
        if context.maker(str(conversion)) is not None:
            reads["conversion"] = str(conversion)
        recipe = _recipe(context, given)
        return Result(
            outputs={"checkpoint": str(output)},
            makes=[output],
            proof=[output / LATEST_ITERATION_FILE],
            reads=reads,
            fingerprint="" if recipe is None else json.dumps(asdict(recipe), default=str),
            recipe=recipe,
        )


def _recipe(context: Context, given: Mapping[str, Any]) -> ConversionConfig | None:
    """The conversion that is asked for, checked; the source says nothing of itself yet.

    One that another step writes is checked by the command.
    """
    overrides = [str(override) for override in given.get("overrides") or []]
    if given.get("conversion") is None:
        if overrides:
            raise ConfigurationError(f"{overrides[0]} changes a recipe, but none is given; add conversion")
        return None
    written = context.maker(str(given["conversion"])) is not None
    if written or not context.is_known([given["conversion"], *overrides]):
        return None
    from spikingbrain_train.config.load import load_conversion
    from spikingbrain_train.config.setting import check_fields

    recipe = load_conversion(str(given["conversion"]), overrides)
    check_fields(recipe)
    return recipe


class Export(WritesFolder):
    """spikingbrain-export. Output: ``model``, a Hugging Face folder."""

    name = "export"
    title = "export to Hugging Face format"
    command = ("export",)

    def parser(self) -> argparse.ArgumentParser:
        from spikingbrain_train.conversion.export_command_line import export_parser

        return export_parser()

    def result(self, context: Context, given: Mapping[str, Any]) -> Result:
        output = Path(str(given["output"]))
        return Result(
            outputs={"model": str(output)},
            makes=[output],
            proof=[output / "config.json"],
            reads={"checkpoint": str(given["checkpoint"])},
        )


class _Measures(OnRanks):
    """A tool that reads a model of either form and writes one JSON file. Output: ``result``."""

    further: tuple[str, ...] = ("tokenizer",)
    """Settings that name further files or folders which it reads."""

    def defaults(self, context: Context) -> dict[str, Any]:
        return {"output": str(context.output / f"{context.name}.json")}

    def result(self, context: Context, given: Mapping[str, Any]) -> Result:
        output = Path(str(given["output"]))
        reads = {name: str(given[name]) for name in ("model", *self.further) if given.get(name) is not None}
        adapters = enumerate(words(given.get("adapters") or []))  # each is NAME=DIR
        reads |= {f"adapters[{n}]": word.partition("=")[2] for n, word in adapters if "=" in word}
        return Result({"result": str(output)}, [output], [output], reads)


class Evaluate(_Measures):
    """spikingbrain-evaluate. Outputs: ``result``, a JSON file, and with ``plot`` that file as ``picture``."""

    name = "evaluate"
    title = "measure held-out cross entropy"
    command = ("evaluate",)
    further = ("tokenizer", "task_data", "teacher", "probe_text", "routed")

    def parser(self) -> argparse.ArgumentParser:
        from spikingbrain_train.evaluation.command_line import evaluate_parser

        return evaluate_parser()

    def result(self, context: Context, given: Mapping[str, Any]) -> Result:
        result = super().result(context, given)
        data, picture = given.get("data"), given.get("plot")
        if picture is not None:
            result.outputs["picture"] = str(picture)
            result.makes.append(Path(str(picture)))
            result.proof.append(Path(str(picture)))
        return replace(result, reads={**result.reads, **dataset("data", words(data) if data else [])})

    def check_arguments(self, arguments: argparse.Namespace) -> None:
        from spikingbrain_train.evaluation.command_line import check_evaluation_options

        check_evaluation_options(arguments)


class Generate(_Measures):
    """spikingbrain-generate. Output: ``result``, a JSON file."""

    name = "generate"
    title = "generate text"
    command = ("generate",)
    further = ("tokenizer", "routed")

    def parser(self) -> argparse.ArgumentParser:
        from spikingbrain_train.evaluation.generate_command_line import generate_parser

        return generate_parser()
