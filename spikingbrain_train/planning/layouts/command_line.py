"""Arguments of ``spikingbrain-plan-parallel``, for which no torch is imported."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from spikingbrain_train.config.command_line import command_parser, user_errors
from spikingbrain_train.config.compose import check_choice, compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.parallel import EngineKind
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.layer_work import ModelWork
from spikingbrain_train.planning.layouts.picture import save_search_picture
from spikingbrain_train.planning.layouts.report import as_values, nothing_fits, render
from spikingbrain_train.planning.layouts.search import Search, check_search, search
from spikingbrain_train.planning.layouts.written import check_output, command_for, write_layout
from spikingbrain_train.planning.step_time import EFFICIENCY
from spikingbrain_train.reporting.plots.formats import format_of
from spikingbrain_train.reporting.tables import terminal_width

_DESCRIPTION = """\
Search the layout in which a model trains fastest on a cluster and fits: data, tensor, pipeline, context and
expert parallelism, the sharded optimizer, unequal and virtual stages, recomputation, micro-batches. It lists
the best with memory, time of a step, MFU, bubble and communication, and says why others were set aside.
"""

_EXAMPLES = """\
examples:
  # the 7B at 8k on 64 GPUs
  spikingbrain-plan-parallel --model spikingbrain_7b --seq-length 8192 --global-batch-size 512 \\
      --cluster h100 --gpus 64

  # an experiment's own model, length and batch; the second of the list as a file of conf's form
  spikingbrain-plan-parallel experiment=spikingbrain_76b_8k --cluster c550 --gpus 512 --choose 2 \\
      --output my_conf/parallel/fast.yaml

  # how it scales, with the batch, as a picture
  spikingbrain-plan-parallel --model spikingbrain_7b --seq-length 8192 --cluster a800 \\
      --gpus 64 256 1024 4096 --global-batch-size 512 2048 8192 32768 --plot scaling.png

  # GPUs of your own
  spikingbrain-plan-parallel --model outputs/hybrid --seq-length 32768 --global-batch-size 64 --gpus 16 \\
      cluster=nvidia cluster.memory_gib=44.5 cluster.peak_tflops=362 cluster.gpus_per_node=4 \\
      cluster.intra_node_gb_per_s=25 cluster.inter_node_gb_per_s=3
"""
_SETTING = re.compile(r"[+~]?[A-Za-z_][\w./@]*=")
_KEPT = ("parallel.context_parallel.", "parallel.expert_tensor_parallel_size")
"""Settings of the section ``parallel`` that the search leaves as they are."""
_MORE_GPUS = 6
"""Doublings after which nobody is told on how many GPUs a model would fit."""


def plan_parallel_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = command_parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="name=value",
        help="settings of the run, as spikingbrain-train takes them; of parallel.* only "
        "context_parallel.* and expert_tensor_parallel_size: all else is searched",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="a choice of conf/model, or the folder of a checkpoint (its config)"
    )
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens of a sequence: stage.seq_length")
    parser.add_argument(
        "--global-batch-size",
        type=int,
        nargs="+",
        metavar="N",
        help="sequences a step: stage.global_batch_size; one, or one for each of --gpus",
    )
    parser.add_argument(
        "--cluster", metavar="NAME", help="a choice of conf/cluster: a800, h100, h200, c550 ..."
    )
    parser.add_argument(
        "--gpus", type=int, nargs="+", required=True, metavar="N", help="GPUs; several show how it scales"
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="layouts to list (default: %(default)s)"
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        default=[EngineKind.megatron.value],
        choices=[each.value for each in EngineKind],
        metavar="NAME",
        help="one or several of megatron, deepspeed (ZeRO 2 and 3 over data- and context-parallel ranks) and "
        "fsdp (beside tensor-parallel ranks, too); default: megatron",
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        default=EFFICIENCY,
        metavar="X",
        help="share of the peak that arithmetic reaches on one GPU: the MFU of a run of yours on one GPU "
        "without recomputation (default: %(default)s)",
    )
    parser.add_argument(
        "--choose",
        type=int,
        default=1,
        metavar="K",
        help="which of the list --output writes (default: the first)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="<folder>/parallel/<name>.yaml to write the layout to"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print plain values for programs")
    return parser


def plan_parallel(arguments: Sequence[str] | None = None) -> None:
    """Search, say what was found, and write what was asked for."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    # Settings stand anywhere, also behind a flag that takes several values.
    settings = [word for word in words if _SETTING.match(word)]
    parsed = plan_parallel_parser().parse_args([word for word in words if word not in settings])
    parsed.settings = [*settings, *parsed.settings]
    with user_errors():
        _check(parsed)
        searches = _searches(parsed)
        if parsed.json:
            print(json.dumps(as_values(searches, parsed.efficiency), indent=2))
        else:
            print(render(searches, parsed.efficiency, terminal_width()))
        if parsed.plot is not None:
            save_search_picture(searches, parsed.plot)
            _say(parsed, f"\npicture: {parsed.plot}")
        if parsed.output is not None:
            _write(parsed, searches[0])


def _check(parsed: argparse.Namespace) -> None:
    for flag, values in (("--gpus", parsed.gpus), ("--top", [parsed.top]), ("--choose", [parsed.choose])):
        for value in values:
            if value < 1:
                raise ConfigurationError(f"{flag} is {value}; give at least 1")
    if not 0 < parsed.efficiency <= 1:
        raise ConfigurationError(
            f"--efficiency is {parsed.efficiency:g}; give a share of the peak, above 0 and at most 1"
        )
    batches = parsed.global_batch_size or [None]
    if len(batches) not in (1, len(parsed.gpus)):
        raise ConfigurationError(
            f"--global-batch-size has {len(batches)} values for {len(parsed.gpus)} of --gpus; "
            "give one, or one each"
        )
    if parsed.choose > parsed.top:
        raise ConfigurationError(
            f"--choose {parsed.choose} is not among the --top {parsed.top} that are listed"
        )
    if parsed.output is not None:
        check_output(parsed.output)
        if len(parsed.gpus) > 1:
            raise ConfigurationError("--output writes one layout; name one number of --gpus")
    if parsed.plot is not None:
        format_of(parsed.plot, "--plot")


def _searches(parsed: argparse.Namespace) -> list[Search]:
    batches = parsed.global_batch_size or [None]
    if len(batches) == 1:
        batches = batches * len(parsed.gpus)
    work: ModelWork | None = None
    configs = {batch: check_search(_config(_settings(parsed, batch))) for batch in dict.fromkeys(batches)}
    engines = [EngineKind(name) for name in parsed.engines]
    searches = []
    for gpus, batch in zip(parsed.gpus, batches, strict=True):
        config = configs[batch]
        _check_nodes(config, gpus)
        work = work or ModelWork(config)
        top = parsed.top if len(parsed.gpus) == 1 else 1
        found = search(config, gpus, top, parsed.efficiency, work, engines)
        if not found.found:
            raise nothing_fits(found, _enough(config, gpus, work, parsed.efficiency, engines))
        searches.append(found)
    return searches


def _settings(parsed: argparse.Namespace, batch: int | None) -> list[str]:
    """The command line of ``spikingbrain-train`` that the flags stand for."""
    settings = list(parsed.settings)
    for word in settings:
        if "=" not in word:
            raise ConfigurationError(f"{word} is no setting; write name=value, e.g. stage.seq_length=8192")
        name = word.partition("=")[0]
        if name == "stage.micro_batch_size" or (name.startswith("parallel.") and not name.startswith(_KEPT)):
            raise ConfigurationError(f"{name} is what is searched; leave {word} out")
    # Folders of hydra.searchpath may have choices of their own.
    all_in_conf = not any(word.partition("=")[0] == "hydra.searchpath" for word in settings)
    if parsed.model is not None:
        folder = Path(parsed.model)
        if folder.is_dir():
            settings += ["model=from_checkpoint", f"checkpoint.load={folder}"]
        else:
            if all_in_conf:
                check_choice("--model", parsed.model, "model", also="the folder of a checkpoint")
            settings.append(f"model={parsed.model}")
    if parsed.cluster is not None:
        if all_in_conf:
            check_choice("--cluster", parsed.cluster, "cluster")
        settings.append(f"cluster={parsed.cluster}")
    if parsed.seq_length is not None:
        settings.append(f"stage.seq_length={parsed.seq_length}")
    if batch is not None:
        settings.append(f"stage.global_batch_size={batch}")
    return settings


def _config(settings: list[str]) -> RunConfig:
    return to_run_config(compose_run([*settings, "dry_run=true"]))


def _check_nodes(config: RunConfig, gpus: int) -> None:
    node = config.cluster.gpus_per_node
    if gpus > node and gpus % node:
        raise ConfigurationError(
            f"--gpus {gpus} are no whole number of nodes of cluster.gpus_per_node={node}; give "
            f"{gpus // node * node} or {(gpus // node + 1) * node}"
        )


def _enough(
    config: RunConfig, gpus: int, work: ModelWork, efficiency: float, engines: Sequence[EngineKind]
) -> int | None:
    """The number of GPUs, doubled again and again, on which a layout fits."""
    for _ in range(_MORE_GPUS):
        gpus *= 2
        if gpus > config.stage.global_batch_size * config.stage.seq_length:
            return None
        if search(config, gpus, 1, efficiency, work, engines).found:
            return gpus
    return None


def _write(parsed: argparse.Namespace, found: Search) -> None:
    if parsed.choose > len(found.found):
        raise ConfigurationError(
            f"--choose {parsed.choose} is not there: {len(found.found)} layouts fit; choose one of them"
        )
    chosen = found.found[parsed.choose - 1]
    write_layout(chosen, parsed.output)
    batch = parsed.global_batch_size[0] if parsed.global_batch_size else None
    command = command_for(chosen, parsed.output, _settings(parsed, batch))
    _say(parsed, f"\nwritten: {parsed.output}\nto plan it, and then to train: {command} dry_run=true")


def _say(parsed: argparse.Namespace, text: str) -> None:
    if not parsed.json:
        print(text)
