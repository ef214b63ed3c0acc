"""Every command: its name, what it is for, and the function that runs it.

The functions stand in :mod:`spikingbrain_train.commands.programs`; the parsers in their rooms
(``<room>/command_line.py``). An installed package has each as ``spikingbrain-<name>`` (pyproject.toml), and
``python -m spikingbrain_train <name>`` needs no installed script.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spikingbrain_train.commands import programs


@dataclass(frozen=True)
class Command:
    """One command."""

    name: str
    """How ``python -m spikingbrain_train`` calls it."""
    summary: str
    """What it is for, in one line."""
    run: Callable[[], None]
    """Reads ``sys.argv`` and does it; ends the process with another code than 0 through SystemExit."""
    door: str
    """The file of a checkout that starts it, too."""

    @property
    def program(self) -> str:
        """What an installed package calls it."""
        return f"spikingbrain-{self.name}"


COMMANDS = (
    Command("train", "train one stage of a model", programs.train, "train.py"),
    Command("plan", "what a run would take: layers, parameters, memory", programs.plan, "tools/plan.py"),
    Command(
        "plan-parallel",
        "search the layout in which a model trains fastest on a cluster",
        programs.plan_parallel,
        "tools/plan_parallel.py",
    ),
    Command(
        "health-check",
        "see whether the hosts of a run are fit for it",
        programs.health_check,
        "tools/health_check.py",
    ),
    Command(
        "cache-teacher",
        "cache the teacher's logits for a distill run",
        programs.cache_teacher,
        "tools/cache_teacher.py",
    ),
    Command(
        "profile-step",
        "what the time of a training step goes to, by part",
        programs.profile_step,
        "tools/profile_step.py",
    ),
    Command("preprocess", "tokenize text for training", programs.preprocess, "tools/preprocess_data.py"),
    Command(
        "convert",
        "Hugging Face folder to Megatron checkpoint and back; inspect either",
        programs.convert,
        "tools/convert_checkpoint.py",
    ),
    Command(
        "choose-layers",
        "which layers of a hybrid keep softmax attention, by measuring each swap",
        programs.choose_layers,
        "tools/choose_layers.py",
    ),
    Command("export", "write a checkpoint as a Hugging Face folder", programs.export, "tools/export.py"),
    Command(
        "quantize",
        "INT8 weights and spikes (W8ASpike) of a trained hybrid",
        programs.quantize,
        "tools/quantize.py",
    ),
    Command("evaluate", "held-out cross entropy of a model", programs.evaluate, "tools/evaluate.py"),
    Command("generate", "continue a prompt with a model", programs.generate, "tools/generate.py"),
    Command(
        "serve", "answer OpenAI-compatible requests with a model folder", programs.serve, "tools/serve.py"
    ),
    Command(
        "analyze-spikes",
        "count and price the spikes of a model on text",
        programs.analyze_spikes,
        "tools/analyze_spikes.py",
    ),
    Command(
        "analyze-sparsity",
        "count the zeros inside a model's feed-forwards on text, fit a threshold",
        programs.analyze_sparsity,
        "tools/analyze_sparsity.py",
    ),
    Command(
        "bricks",
        "neurons and experts as bricks: what they do, what a model is without them",
        programs.bricks,
        "tools/bricks.py",
    ),
    Command("plot", "draw runs: losses, layers, experts, spikes", programs.plot, "tools/plot_metrics.py"),
    Command(
        "pipeline",
        "run the steps that a YAML file lists, one after the other",
        programs.pipeline,
        "tools/run_pipeline.py",
    ),
    Command("demo", "a dense model to an exported hybrid, in minutes", programs.demo, "tools/demo.py"),
    Command(
        "measure-speed",
        "how fast this machine trains and evaluates, for the demo",
        programs.measure_speed,
        "tools/measure_speed.py",
    ),
    Command(
        "download-smollm2",
        "get the demo's dense model",
        programs.download_smollm2,
        "tools/download_smollm2.py",
    ),
    Command(
        "completion",
        "have bash, zsh or fish complete all of these",
        programs.completion,
        "tools/completion.py",
    ),
)
"""In the order in which a user meets them."""
