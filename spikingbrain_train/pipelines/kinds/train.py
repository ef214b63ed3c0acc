"""A run of spikingbrain-train."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from spikingbrain_train.architecture.annealed_quantization import AnnealedQuantizationKind
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.config.blend import check_blend, prefixes_of
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.model import ActivationFunc
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.pipelines.kinds.kind import Context, StepKind, dataset, given_ranks, stamp
from spikingbrain_train.pipelines.steps import Step, own_command
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.planner import launched_world_size
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER
from spikingbrain_train.training.callbacks.named import check_named_classes

_NO_LIMIT = 2**30


class Train(StepKind):
    """A run of spikingbrain-train.

    ``settings`` holds its settings by their dotted names, ``arguments`` further words of its command line,
    which win. ``nproc_per_node`` starts that many ranks, and ``launch`` replaces ``spikingbrain-train``
    altogether (srun, sbatch --wait ...). Outputs: ``run``, its output_dir, and ``checkpoint``, the folder of
    its checkpoints.
    """

    name = "train"
    title = "train a stage"

    def settings(self) -> Mapping[str, bool]:
        return {
            "settings": False,
            "arguments": False,
            "output": False,
            "nproc_per_node": False,
            "launch": False,
        }

    def plan(self, context: Context, given: Mapping[str, Any]) -> Step:
        output = str(given.get("output") or context.output / context.name)
        settings, further = given.get("settings") or {}, given.get("arguments") or []
        if not isinstance(settings, Mapping):
            raise ConfigurationError("settings must hold name: value lines, e.g. stage.train_iters: 100")
        if not isinstance(further, list):
            raise ConfigurationError("arguments must be a list, e.g. [stage.train_iters=100]")
        if "output_dir" in settings:
            raise ConfigurationError("output_dir is not given among settings; give the step output: <folder>")
        words = [f"{name}={hydra_value(value)}" for name, value in flat(settings).items()]
        words += [f"output_dir={hydra_value(output)}", *(str(word) for word in further)]
        ranks, launcher = _launcher(context, given)
        run = compose_run([word for word in words if context.is_known(word)])
        if all(context.is_known(word) for word in words):
            check_run(context, words, run, ranks)
        named = {
            "checkpoint.load": run.checkpoint.load,
            "stage.teacher": run.stage.teacher,
            "stage.distillation.cache": run.stage.distillation.cache,
            "data.tokenizer": run.data.tokenizer,
            **dataset("data.train", _prefixes(run.data.train)),
            **dataset("data.valid", run.data.valid),
        }
        reads = {name: path for name, path in named.items() if path is not None}
        files = [path for path in reads.values() if context.maker(path) is None]
        return Step(
            context.name,
            self.title,
            [*launcher, *words],
            outputs={"run": output, "checkpoint": str(Path(output) / CHECKPOINT_FOLDER)},
            makes=[Path(output)],
            reads=reads,
            fingerprint=OmegaConf.to_yaml(run) + stamp(files),
            train_iters=run.stage.train_iters,
        )


def _prefixes(entries: ListConfig) -> list[str]:
    """Of data.train. Raises ConfigurationError where it is no blend."""
    train: Any = OmegaConf.to_container(entries, resolve=True)
    check_blend("data.train", train)
    return prefixes_of(train)


def _launcher(context: Context, given: Mapping[str, Any]) -> tuple[int | None, list[str]]:
    """How many ranks there will be, where that is known, and the words in front of the run's own."""
    launch = given.get("launch")
    if launch is not None:
        if given.get("nproc_per_node") is not None:
            raise ConfigurationError("launch says it all; leave nproc_per_node out, or launch")
        words = launch if isinstance(launch, list) else str(launch).split()
        return None, [str(word) for word in words]
    ranks = given_ranks(context, given)
    if ranks is None:
        return 1, own_command("train")
    return ranks, own_command("train", "--nproc-per-node", str(ranks))


def check_run(context: Context, words: list[str], run: DictConfig, ranks: int | None) -> None:
    """Refuse at once what spikingbrain-train would refuse later, hours into the pipeline.

    Args:
        context: where the step stands.
        words: arguments of spikingbrain-train.
        run: the config that they compose.
        ranks: how many there will be; None takes as many as the layout needs.

    Raises:
        SpikingBrainError: settings that contradict each other, or do not fit the ranks, or name classes that
            are not there.
    """
    config = _config_of(context, words, run)
    check_run_config(config, launched_world_size(config) if ranks is None else ranks)
    check_named_classes(config, lambda path: context.maker(path) is not None)


def _config_of(context: Context, words: list[str], run: DictConfig) -> RunConfig:
    planned = run.copy()
    planned.dry_run = True
    load = run.checkpoint.load
    maker = None if load is None else context.maker(load)
    try:
        return to_run_config(planned)
    except CheckpointError:
        if maker is None:
            raise
    # The model that the stage reads is not made yet: a small one stands for it.
    made = _Made.of(context, maker)
    stand_in = ["model=tiny_hybrid", f"model.max_position_embeddings={made.longest_sequence}"]
    if made.activation_func is not None:
        stand_in.append(f"model.activation_func={made.activation_func.value}")
    elif run.stage.sparsity.l1_factors:  # nobody knows it yet: not refused before the model is there
        stand_in.append(f"model.activation_func={ActivationFunc.relu.value}")
    if made.recipe is not None:
        stand_in += _faded_in(made.recipe)
    else:  # nor this
        if run.stage.quantization_annealing.anneal_iters:
            kind = next(each for each in LINEAR_TRANSFORMS if isinstance(each, AnnealedQuantizationKind))
            stand_in.append(f"model.{kind.name}.projections=[{Projection.mlp_fc1.value}]")
        if run.stage.sub_norm_annealing.anneal_iters:
            stand_in.append("model.ffn_sub_norm=true")
    settings = [word for word in words if word.partition("=")[0] != "model"]
    return to_run_config(compose_run([*stand_in, *settings, "dry_run=true"]))


@dataclass(frozen=True)
class _Made:
    """What is known of a checkpoint before its step has run."""

    longest_sequence: int = _NO_LIMIT
    activation_func: ActivationFunc | None = None
    recipe: ConversionConfig | None = None

    @classmethod
    def of(cls, context: Context, maker: Step | None) -> _Made:
        """Of the Hugging Face folder that it goes back to, and of the recipe that converts it."""
        while maker is not None and "hf" not in maker.reads:
            load = maker.reads.get("checkpoint.load")
            maker = None if load is None else context.maker(load)
        if maker is None:
            return cls()
        recipe = maker.recipe
        activation = None if recipe is None else recipe.activation_func
        try:
            config = json.loads((Path(maker.reads["hf"]) / "config.json").read_text(encoding="utf-8"))
            longest, source = config.get("max_position_embeddings"), config.get("hidden_act")
        except (OSError, ValueError, AttributeError):
            return cls(activation_func=activation, recipe=recipe)
        if activation is None and source in [func.value for func in ActivationFunc]:
            activation = ActivationFunc(source)
        return cls(longest if type(longest) is int and longest > 0 else _NO_LIMIT, activation, recipe)


def _faded_in(recipe: ConversionConfig) -> list[str]:
    """Settings of a run: what of the recipe comes in over the steps of a stage.

    Sub-norms; what it rounds, weights or inputs, and in which projections.
    """
    norms = {"attn_sub_norm": recipe.attn_sub_norm, "ffn_sub_norm": recipe.ffn_sub_norm}
    return [f"model.{name}=true" for name, is_asked in norms.items() if is_asked] + [
        f"model.{kind.name}.projections={hydra_value([each.value for each in named])}"
        for kind in LINEAR_TRANSFORMS
        if isinstance(kind, AnnealedQuantizationKind)
        and (named := getattr(getattr(recipe, kind.name, None), "projections", []))
    ]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def hydra_value(value: Any) -> str:
    """A value in Hydra's override grammar.

    Text is quoted where it is more than a plain word (``<model>`` stands for a variable without value), and
    in lists where Hydra takes it for a number: lists of mixed kinds are not converted to their setting's.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_quoted(i) if _is_read_otherwise(i) else hydra_value(i) for i in value)}]"
    if isinstance(value, Mapping):  # an entry of a list, such as a dataset with its weight
        inner = ",".join(f"{name}:{hydra_value([item])[1:-1]}" for name, item in value.items())
        return f"{{{inner}}}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = str(value)
    if re.fullmatch(r"[\w./-]+|<\w+>", text, re.ASCII):
        return text
    return _quoted(text)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _is_read_otherwise(value: Any) -> bool:
    """Whether it is text that Hydra takes for a number, a truth value or nothing."""
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return value.lower() in ("true", "false", "null")
    return True
