"""Programs, run as a shell would run them, but forked from one process that has imported what is slow.

Importing torch, megatron-core and transformers takes ten seconds, and the pages have dozens of commands.
Run as a program, this file imports them once, then reads one job a line from standard input. Every rank of a
job is a fork with arguments, folder, environment and exit code of its own; none sees what another left.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "megatron.core.models.gpt",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "spikingbrain_train.config.compose",
    "spikingbrain_train.conversion.export_checkpoint",
    "spikingbrain_train.conversion.import_checkpoint",
    "spikingbrain_train.evaluation.pretrained",
    "spikingbrain_train.training.trainer",
)
SECONDS = 300
"""How long one program may take."""


@dataclass(frozen=True)
class Finished:
    """How a program ended."""

    code: int
    """0, or the exit code of the first rank that has another."""
    said: str
    """Standard output and error of all ranks."""
    seconds: float
    """Of the processor, all ranks together."""


class Programs:
    """The process that forks them; a context manager."""

    def __enter__(self) -> Programs:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it

    def run(self, words: list[str], folder: Path, ranks: int = 1, **environment: str) -> Finished:
        """Run ``python <words>`` in ``folder``.

        Args:
            words: a script or ``-m`` and a module, then arguments.
            folder: where.
            ranks: more than one are started as torchrun starts them.
            environment: further variables.
        """
        launched = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for rank in range(ranks):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            launched.append({} if ranks == 1 else {**meeting, **{k: str(v) for k, v in world.items()}})
        job = {"words": words, "folder": str(folder), "ranks": [{**environment, **one} for one in launched]}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        codes, seconds = json.loads(self._process.stdout.readline())
        said = "".join((folder / f".said{rank}").read_text() for rank in range(ranks))
        return Finished(next((code for code in codes if code), 0), said, seconds)


def _serve() -> None:
    """Fork a process for every rank of every job."""
    import torch

    for module in IMPORTED:
        importlib.import_module(module)

    torch.set_num_threads(1)
    gc.freeze()  # else each fork copies what is imported when it collects garbage
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank, environment in enumerate(job["ranks"]):
            child = os.fork()
            if child == 0:
                become(job["words"], Path(job["folder"]), rank, environment)
                return
            children.append(child)
        ended = [os.wait4(child, 0) for child in children]
        codes = [os.waitstatus_to_exitcode(status) for _, status, _ in ended]
        print(json.dumps([codes, sum(used.ru_utime + used.ru_stime for *_, used in ended)]), flush=True)


def become(words: list[str], folder: Path, rank: int, environment: dict[str, str]) -> None:
    """Be the program: raises SystemExit as it does."""
    import torch

    # The first call behind a fork makes torch's thread pool anew. Of several threads that do so at once, as
    # when transformers reads weights, some find no pool.
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(environment)
    output = os.open(folder / f".said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(SECONDS)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


if __name__ == "__main__":
    _serve()
