"""The function behind each command: what pyproject.toml's entry points, train.py and tools/ call.

Each imports its room when it is called, so that starting one command does not import the others.
"""

from __future__ import annotations

from spikingbrain_train.commands.start_signals import program


@program
def train() -> None:
    """Train one stage of a model."""
    from spikingbrain_train.commands.train import train

    train()


@program
def plan() -> None:
    """What a run would take."""
    from spikingbrain_train.commands.train import plan

    plan()


@program
def plan_parallel() -> None:
    """Search the layout of a run."""
    from spikingbrain_train.planning.layouts.command_line import plan_parallel

    plan_parallel()


@program
def health_check() -> None:
    """See whether the hosts of a run are fit for it."""
    from spikingbrain_train.commands.health_check import health_check

    health_check()


@program
def cache_teacher() -> None:
    """Cache the teacher's logits."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.training.cache_command_line import cache_teacher

    here_or_on_ranks("cache-teacher", cache_teacher)


@program
def profile_step() -> None:
    """Say what a training step's time goes to."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.training.profiling.command_line import profile_step

    here_or_on_ranks("profile-step", profile_step)


@program
def preprocess() -> None:
    """Tokenize text."""
    from spikingbrain_train.data.command_line import preprocess_data

    preprocess_data()


@program
def convert() -> None:
    """Convert and inspect checkpoints."""
    from spikingbrain_train.conversion.command_line import convert_checkpoint

    convert_checkpoint()


@program
def choose_layers() -> None:
    """Choose the layers that keep softmax attention."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.layer_choice.command_line import choose_layers

    here_or_on_ranks("choose-layers", choose_layers)


@program
def export() -> None:
    """Write a checkpoint as a Hugging Face folder."""
    from spikingbrain_train.conversion.command_line import export

    export()


@program
def quantize() -> None:
    """Make INT8 weights and spikes of a trained hybrid."""
    from spikingbrain_train.quantization.command_line import quantize

    quantize()


@program
def evaluate() -> None:
    """Measure held-out cross entropy."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.evaluation.command_line import evaluate

    here_or_on_ranks("evaluate", evaluate)


@program
def analyze_spikes() -> None:
    """Count and price spikes."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.spike_analysis.command_line import analyze_spikes

    here_or_on_ranks("analyze-spikes", analyze_spikes)


@program
def analyze_sparsity() -> None:
    """Count zeros inside feed-forwards."""
    from spikingbrain_train.activation_sparsity.command_line import analyze_sparsity
    from spikingbrain_train.commands.inference import here_or_on_ranks

    here_or_on_ranks("analyze-sparsity", analyze_sparsity)


@program
def bricks() -> None:
    """Look at, take apart and put together the parts of a model."""
    from spikingbrain_train.bricks.command_line import bricks
    from spikingbrain_train.commands.inference import here_or_on_ranks

    here_or_on_ranks("bricks", bricks)


@program
def generate() -> None:
    """Continue a prompt."""
    from spikingbrain_train.commands.inference import here_or_on_ranks
    from spikingbrain_train.evaluation.generate_command_line import generate

    here_or_on_ranks("generate", generate)


@program
def serve() -> None:
    """Answer OpenAI-compatible requests."""
    from spikingbrain_train.evaluation.serve_command_line import serve

    serve()


@program
def plot() -> None:
    """Draw runs."""
    from spikingbrain_train.reporting.command_line import plot

    plot()


@program
def pipeline() -> None:
    """Run, plan or follow a pipeline."""
    from spikingbrain_train.pipelines.command_line import pipelines

    pipelines()


@program
def demo() -> None:
    """Run the demo."""
    from spikingbrain_train.pipelines.demo.command_line import demo

    demo()


@program
def measure_speed() -> None:
    """Measure how fast this machine is."""
    from spikingbrain_train.pipelines.demo.speed import measure_speed_command_line

    measure_speed_command_line()


@program
def download_smollm2() -> None:
    """Get the demo's model."""
    from spikingbrain_train.pipelines.demo.smollm2 import download_command_line

    download_command_line()


@program
def completion() -> None:
    """Print what makes a shell complete the others."""
    from spikingbrain_train.commands.completion import completion

    completion()
