"""The two training stages as command lines of train.py, checked before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.pipelines.demo.named_settings import RATES, WARM_UP, NamedSettings
from spikingbrain_train.planning.checks import check_run_config

_NO_LIMIT = 2**30


def stage_arguments(stage: str, load: Path, run: Path, text: Path, teacher: Path) -> list[str]:
    """The recipe of a stage, with the places of what it reads and writes."""
    return [
        f"experiment=smollm2_{stage}",
        f"checkpoint.load={_hydra_value(load)}",
        f"stage.teacher={_hydra_value(teacher)}",
        f"data.train=[{_hydra_value(f'{text}_train')}]",
        f"data.valid=[{_hydra_value(f'{text}_valid')}]",
        f"output_dir={_hydra_value(run)}",
    ]


def beside_own(stage: str, arguments: Sequence[str], own: NamedSettings) -> list[str]:
    """What of ``arguments`` cannot stand beside the user's own settings, scaled to them: a warm-up longer
    than the stage becomes an eighth of it, a last rate above the first a tenth of that."""
    named = list(getattr(own, stage))
    if not named:
        return []
    run = compose_run([*arguments, *named])
    scaled = []
    if not own.in_stage(stage, WARM_UP) and run.optimizer.lr_warmup_iters >= run.stage.train_iters:
        scaled.append(f"{WARM_UP}={run.stage.train_iters // 8}")
    if not own.in_stage(stage, RATES[1]) and run.optimizer.min_lr > run.optimizer.lr:
        scaled.append(f"{RATES[1]}={run.optimizer.lr / 10:g}")
    return scaled


def check_stage_arguments(arguments: Sequence[str], model: Path) -> None:
    """Refuse at once what train.py would refuse later, minutes into the demo.

    Args:
        arguments: of train.py.
        model: Hugging Face folder that the demo starts from; it says how long sequences may be.

    Raises:
        ConfigurationError: settings that contradict each other.
    """
    # The model that the stage reads is not made yet: a small one stands for it.
    stand_in = ["model=tiny_hybrid", f"model.max_position_embeddings={_longest_sequence(model)}"]
    settings = [argument for argument in arguments if argument.partition("=")[0] != "model"]
    run = compose_run([*stand_in, *settings, "dry_run=true"])
    check_run_config(to_run_config(run), world_size=1)


def windows(run: DictConfig) -> tuple[int, int]:
    """Tokens of a held-out window, and how many windows a stage evaluates on at most."""
    return run.stage.seq_length, run.logging.eval_iters * run.stage.global_batch_size


def _longest_sequence(model: Path) -> int:
    try:
        longest = json.loads((model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError):
        return _NO_LIMIT
    return longest if type(longest) is int and longest > 0 else _NO_LIMIT


def _hydra_value(path: str | Path) -> str:
    """A path as a value of Hydra's override grammar: quoted where it is more than a plain word."""
    text = str(path)
    if re.fullmatch(r"[\w./-]+", text, re.ASCII):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
