"""The argparse parser of every command that has one; a run's command line is Hydra's.

Each imports its room when it is asked for, as :mod:`spikingbrain_train.commands.programs` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable


def _cache_teacher() -> argparse.ArgumentParser:
    from spikingbrain_train.training.cache_command_line import cache_teacher_parser

    return cache_teacher_parser()


def _profile_step() -> argparse.ArgumentParser:
    from spikingbrain_train.training.profiling.command_line import profile_step_parser

    return profile_step_parser()


def _health_check() -> argparse.ArgumentParser:
    from spikingbrain_train.health.command_line import health_check_parser

    return health_check_parser()


def _plan_parallel() -> argparse.ArgumentParser:
    from spikingbrain_train.planning.layouts.command_line import plan_parallel_parser

    return plan_parallel_parser()


def _preprocess() -> argparse.ArgumentParser:
    from spikingbrain_train.data.command_line import preprocess_parser

    return preprocess_parser()


def _convert() -> argparse.ArgumentParser:
    from spikingbrain_train.conversion.command_line import convert_parser

    return convert_parser()


def _choose_layers() -> argparse.ArgumentParser:
    from spikingbrain_train.layer_choice.command_line import choose_layers_parser

    return choose_layers_parser()


def _export() -> argparse.ArgumentParser:
    from spikingbrain_train.conversion.export_command_line import export_parser

    return export_parser()


def _quantize() -> argparse.ArgumentParser:
    from spikingbrain_train.quantization.command_line import quantize_parser

    return quantize_parser()


def _evaluate() -> argparse.ArgumentParser:
    from spikingbrain_train.evaluation.command_line import evaluate_parser

    return evaluate_parser()


def _generate() -> argparse.ArgumentParser:
    from spikingbrain_train.evaluation.generate_command_line import generate_parser

    return generate_parser()


def _serve() -> argparse.ArgumentParser:
    from spikingbrain_train.evaluation.serve_command_line import serve_parser

    return serve_parser()


def _analyze_spikes() -> argparse.ArgumentParser:
    from spikingbrain_train.spike_analysis.command_line import analyze_spikes_parser

    return analyze_spikes_parser()


def _analyze_sparsity() -> argparse.ArgumentParser:
    from spikingbrain_train.activation_sparsity.command_line import analyze_sparsity_parser

    return analyze_sparsity_parser()


def _bricks() -> argparse.ArgumentParser:
    from spikingbrain_train.bricks.command_line import bricks_parser

    return bricks_parser()


def _plot() -> argparse.ArgumentParser:
    from spikingbrain_train.reporting.command_line import plot_parser

    return plot_parser()


def _pipeline() -> argparse.ArgumentParser:
    from spikingbrain_train.pipelines.command_line import pipelines_parser

    return pipelines_parser()


def _demo() -> argparse.ArgumentParser:
    from spikingbrain_train.pipelines.demo.command_line import demo_parser

    return demo_parser()


def _measure_speed() -> argparse.ArgumentParser:
    from spikingbrain_train.pipelines.demo.speed import measure_speed_parser

    return measure_speed_parser()


def _download_smollm2() -> argparse.ArgumentParser:
    from spikingbrain_train.pipelines.demo.smollm2 import download_parser

    return download_parser()


def _completion() -> argparse.ArgumentParser:
    from spikingbrain_train.commands.completion_scripts import completion_parser

    return completion_parser()


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "health-check": _health_check,
    "plan-parallel": _plan_parallel,
    "cache-teacher": _cache_teacher,
    "profile-step": _profile_step,
    "preprocess": _preprocess,
    "convert": _convert,
    "choose-layers": _choose_layers,
    "export": _export,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "generate": _generate,
    "serve": _serve,
    "analyze-spikes": _analyze_spikes,
    "analyze-sparsity": _analyze_sparsity,
    "bricks": _bricks,
    "plot": _plot,
    "pipeline": _pipeline,
    "demo": _demo,
    "measure-speed": _measure_speed,
    "download-smollm2": _download_smollm2,
    "completion": _completion,
}
