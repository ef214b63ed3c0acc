"""The function behind each command: what pyproject.toml's entry points, train.py and tools/ call.

Each imports its room when it is called, so that starting one command does not import the others.
"""

from __future__ import annotations

import sys


def train() -> None:
    """Train one stage of a model."""
    from spikingbrain_train.commands.train import train

    train()


def plan() -> None:
    """What a run would take."""
    from spikingbrain_train.commands.train import plan

    plan()


def cache_teacher() -> None:
    """Cache the teacher's logits."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.training.cache_command_line import cache_teacher

    here_or_on_ranks("cache-teacher", cache_teacher)


def preprocess() -> None:
    """Tokenize text."""
    from spikingbrain_train.data.command_line import preprocess_data

    sys.exit(preprocess_data())


def convert() -> None:
    """Convert and inspect checkpoints."""
    from spikingbrain_train.conversion.command_line import convert_checkpoint

    convert_checkpoint()


def choose_layers() -> None:
    """Choose the layers that keep softmax attention."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.layer_choice.command_line import choose_layers

    here_or_on_ranks("choose-layers", choose_layers)


def export() -> None:
    """Write a checkpoint as a Hugging Face folder."""
    from spikingbrain_train.conversion.command_line import export

    export()


def evaluate() -> None:
    """Measure held-out cross entropy."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.evaluation.command_line import evaluate

    here_or_on_ranks("evaluate", evaluate)


def generate() -> None:
    """Continue a prompt."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.evaluation.command_line import generate

    here_or_on_ranks("generate", generate)


def plot() -> None:
    """Draw runs."""
    from spikingbrain_train.reporting.command_line import plot

    plot()


def pipeline() -> None:
    """Run, plan or follow a pipeline."""
    from spikingbrain_train.pipelines.command_line import pipelines

    pipelines()


def demo() -> None:
    """Run the demo."""
    from spikingbrain_train.pipelines.demo.command_line import demo

    demo()


def measure_speed() -> None:
    """Measure how fast this machine is."""
    from spikingbrain_train.pipelines.demo.speed import measure_speed_command_line

    measure_speed_command_line()


def download_smollm2() -> None:
    """Get the demo's model."""
    from spikingbrain_train.pipelines.demo.smollm2 import download_command_line

    download_command_line()


def completion() -> None:
    """Print what makes a shell complete the others."""
    from spikingbrain_train.commands.completion import completion

    completion()
