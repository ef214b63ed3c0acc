"""Commands of the pages as they are run here: their own words, with sizes for one core and a second."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.planning.checks import check_run_config
from spikingbrain_train.planning.costs import total_parameters
from spikingbrain_train.planning.plan_report.report import render
from spikingbrain_train.planning.planner import plan_run
from tests.docs.pages import ROOT, fenced
from tests.evaluation.multiple_choice.small_tasks import write_tasks
from tests.programs import Finished, Programs
from tests.scripts.allocation import SLURM, Allocation

MODELS = {"models/SmolLM2-135M-Instruct": "llama", "models/Qwen2.5-7B": "qwen2"}
"""Folder that pages name -> family of the tiny model that lies there."""
NPROC = "--nproc-per-node"
GPUS_OF_A_NODE = 8
SBATCH_OPTIONS = {"nodes", "dependency", "job-name", "partition", "parsable", "requeue", "time", "wait"}
LARGEST = 10e6
"""Parameters of a model that is trained as it is; in the place of a larger one stands the tiny one."""
SHORT = {
    **{"--seq-length": 64, "--max-windows": 2, "--max-new-tokens": 4},
    **{"--workers": 1, "--valid-tokens": 2000},
    **{"--probe-lengths": "1k", "--probe-samples": 1},
    **{"--teacher-prompts": 2, "--teacher-new-tokens": 4},
}
"""Flag -> its value here, where a page gives another."""
LONGEST = {8192: 64, 32768: 96, 131072: 128}
"""Sequences of up to so many tokens -> tokens here."""


_MODULE = re.compile(r"# (my_package/\w+\.py)\n")
_SETTINGS = re.compile(r"(?:# @package \w+\n)?# (my_conf/\w+/\w+\.yaml)\n")


def write_files(page: str, folder: Path) -> None:
    """The blocks of a page that begin with the path of a file: Python's, and settings in YAML."""
    for pattern, language in ((_MODULE, "python"), (_SETTINGS, "yaml")):
        for _, block in fenced(page, language):
            if found := pattern.match(block):
                (folder / found[1]).parent.mkdir(parents=True, exist_ok=True)
                (folder / found[1]).write_text(block)


class Workplace:
    """A folder that looks like a checkout with models and text in it, and what has been done there."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        self.folder, self.programs = folder, programs
        self._runs: Counter[str] = Counter()
        for name in ("train.py", "tools", "conf", "scripts", "spikingbrain_train", "docs", "benchmarks"):
            (folder / name).symlink_to(ROOT / name)
        _write_text(folder / "corpus")
        write_tasks(folder / "data/tasks")
        for model, family in MODELS.items():
            made = programs.run([str(ROOT / "tests/docs/tiny_models.py"), family, model], folder)
            assert made.code == 0, made.said

    def run(self, words: list[str], ranks: int = 1) -> Finished:
        """Run a program of this project: ``spikingbrain-<command> ...``, ``-m <module> ...`` or a script.

        With ``--nproc-per-node`` on two ranks, which are started here.
        """
        if ranks == 1 and NPROC in words and "dry_run=true" not in words:
            flag = words.index(NPROC)
            words, ranks = words[:flag] + words[flag + 2 :], 2
        words = [re.sub(r"[^ =]*/iter_\d+", self._newest, word) for word in words]
        if words[0].startswith("spikingbrain-"):
            words = ["-m", "spikingbrain_train", words[0].removeprefix("spikingbrain-"), *words[1:]]
        return self.programs.run(words, self.folder, ranks)

    def _newest(self, checkpoint: re.Match[str]) -> str:
        """A run of a few steps has no iteration 40: its newest in the place of the one that a page names."""
        made = sorted((self.folder / checkpoint[0]).parent.glob("iter_*"))
        return str(made[-1].relative_to(self.folder)) if made else checkpoint[0]

    def forget(self, kept: set[Path]) -> None:
        """Remove what lies in outputs/ but for some."""
        for folder in self.made() - kept:
            shutil.rmtree(folder)

    def made(self) -> set[Path]:
        """Folders of outputs/."""
        return set((self.folder / "outputs").iterdir())

    def plan(self, arguments: list[str], ranks: int) -> RunConfig:
        """Compose a training of ``ranks`` ranks as it is, check it and lay it out."""
        with _inside(self.folder):
            config = to_run_config(compose_run([*arguments, "dry_run=true"]))
            check_run_config(config, ranks)
            assert render(plan_run(config, ranks))
        return config

    def train(self, arguments: list[str], config: RunConfig, ranks: int) -> Finished:
        """Run a training at small size, on two ranks where it is split or has several."""
        parallel, stage = config.parallel, config.stage
        replaced = r"(cluster|parallel|precision)[.=]|logging=wandb"
        kept = [word for word in arguments if not re.match(replaced, word)]
        if total_parameters(config.model) > LARGEST:
            kept = [*(word for word in kept if not re.match("model[.=]", word)), "model=from_checkpoint"]
        splits = {
            "tp2": parallel.tensor_model_parallel_size > 1,
            "cp2": parallel.context_parallel_size > 1,
            "pp2": parallel.pipeline_model_parallel_size > 1,
        }
        split = next((choice for choice, wanted in splits.items() if wanted), "single")
        length = next(small for full, small in LONGEST.items() if stage.seq_length <= full)
        ranks = 1 if ranks == 1 else 2
        self._runs[config.output_dir] += 1  # started again it goes on
        small = {
            "cluster": "cpu",
            "cluster.peak_tflops": 0.1,
            "precision": "fp32",
            "parallel": split,
            "parallel.data_parallel_size": "null",
            "parallel.expert_model_parallel_size": min(2, parallel.expert_model_parallel_size),
            "parallel.use_distributed_optimizer": str(parallel.use_distributed_optimizer).lower(),
            "stage.train_iters": 2 * self._runs[config.output_dir] if stage.train_iters else 0,
            "stage.seq_length": length + config.model.num_sink_tokens,  # text is left beside them
            "stage.micro_batch_size": 1,
            "stage.global_batch_size": 2,
            "stage.alignment.calibration_tokens": 64,
            "optimizer.lr_warmup_iters": 0,
            "logging": "wandb_offline" if config.logging.wandb.name != "disabled" else "default",
            "logging.log_interval": 1,
            "logging.eval_interval": 0,
            "logging.eval_iters": 1,
        }
        overrides = [f"{name}={value}" for name, value in small.items()]
        return self.run(["spikingbrain-train", *kept, *overrides], ranks)


def launched(words: list[str], folder: Path) -> tuple[list[str], int]:
    """The arguments of the training that a command starts, and on how many ranks.

    Args:
        words: spikingbrain-train or sbatch with their arguments.
        folder: for what the stand-ins of Slurm write.
    """
    if words[0] == "sbatch":
        return _submitted(words[1:], folder)
    if words[1] == NPROC:
        return words[3:], int(words[2])
    return words[1:], 1


def _submitted(words: list[str], folder: Path) -> tuple[list[str], int]:
    """What a batch script makes of its arguments, in an allocation of as many nodes."""
    position = next(index for index, word in enumerate(words) if not word.startswith("--"))
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words[:position])
    assert options.keys() <= SBATCH_OPTIONS, f"sbatch --{', --'.join(options.keys() - SBATCH_OPTIONS)}?"
    script = ROOT / words[position]
    assert script.parent == SLURM and script.is_file(), f"there is no {words[position]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    allocation = Allocation(folder)
    nodes = options.get("nodes", "1")
    ended = allocation.run(*words[position + 1 :], script=script.name, SLURM_JOB_NUM_NODES=nodes)
    assert ended.returncode == 0, ended.stderr
    told = allocation.called("torchrun0")
    assert f"--nnodes={nodes}" in told and f"--nproc-per-node={GPUS_OF_A_NODE}" in told
    return told[told.index("train.py") + 1 :], int(nodes) * GPUS_OF_A_NODE


def shortened(words: list[str]) -> list[str]:
    """A command of another kind with less text, shorter windows and fewer tokens."""
    changed = [{"pydoc-topics": "corpus/web.jsonl"}.get(word, word) for word in words]
    for flag, most in SHORT.items():
        if flag in changed:
            changed[changed.index(flag) + 1] = str(most)
    more = {
        "spikingbrain-choose-layers": ("--tokens", "--calibration-tokens"),
        "spikingbrain-evaluate": ("--max-windows",),
        "spikingbrain-generate": ("--max-new-tokens",),
        "spikingbrain-analyze-spikes": ("--seq-length", "--windows"),
        "spikingbrain-analyze-sparsity": ("--seq-length", "--windows"),
        "spikingbrain-bricks": ("--seq-length", "--windows"),
    }
    for flag in more.get(changed[0], ()):
        if flag not in changed:
            changed += [flag, "2"]
    return changed


def _write_text(folder: Path) -> None:
    """Three sources of a few kilobytes, in the forms that pages name."""
    (folder / "books").mkdir(parents=True)
    texts = [topics[key] for key in sorted(topics)[:60]]
    lines = [json.dumps({"text": text, "source": f"site {len(text) % 2}"}) for text in texts[:30]]
    (folder / "web.jsonl").write_text("\n".join(lines))
    with gzip.open(folder / "code.jsonl.gz", "wt") as code:
        code.write("\n".join(json.dumps({"content": text}) for text in texts[30:50]))
    for number, text in enumerate(texts[50:]):
        (folder / "books" / f"{number}.txt").write_text(text)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def installed() -> set[str]:
    """Commands that pyproject.toml installs."""
    text = (ROOT / "pyproject.toml").read_text()
    return set(re.findall(r"^(spikingbrain-[\w-]+) = ", text, re.M))


def parses(script: str) -> bool:
    """Whether bash reads a block of commands."""
    return subprocess.run(["bash", "-n"], input=script, text=True, stderr=sys.stderr).returncode == 0
