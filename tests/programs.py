"""Programs, run as a shell would run them, but forked from one process that has imported what is slow.

Importing torch, megatron-core and transformers takes ten seconds, and composing the first config one;
hundreds of tests start a command. Run as a program, this file imports them once, then reads one job a line
from standard input. Every rank of a job is a fork with arguments, folder, environment and exit code of its
own; none sees what another left. What a pipeline starts is forked in its turn, and so are the ranks of
``--nproc-per-node``: their agent is torchrun's own, with its rendezvous.

What is to be tested of a start itself (its signals, its launcher) needs a process of its own.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_TORCH = (
    "spikingbrain_train.commands.train",
    "spikingbrain_train.config.compose",
    "spikingbrain_train.planning.planner",
    "spikingbrain_train.planning.plan_report.report",
)
ALL = (
    "megatron.core.models.gpt",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    *WITHOUT_TORCH,
    "spikingbrain_train.conversion.export_checkpoint",
    "spikingbrain_train.conversion.import_checkpoint",
    "spikingbrain_train.evaluation.pretrained",
    "spikingbrain_train.pipelines.command_line",
    "spikingbrain_train.pipelines.demo.kinds",
    "spikingbrain_train.training.trainer",
    "torch._dynamo",  # torch's optimizers import it, for a second, when the first one is made
)
SECONDS = 300
"""How long one program may take."""


@dataclass(frozen=True)
class Finished:
    """How a program ended."""

    code: int
    """0, or the exit code of the first rank that has another; a signal that ended it is negative."""
    output: str
    """Standard output of all ranks."""
    errors: str
    """Standard error of all ranks."""
    seconds: float
    """Of the processor, all ranks together."""

    @property
    def said(self) -> str:
        """All of it."""
        return self.output + self.errors


class Programs:
    """The process that forks them, begun with the first; a context manager.

    Args:
        imported: modules that they find imported.
        python: the interpreter.
        path: of the package; None: the one that is installed there.
    """

    def __init__(
        self, imported: Sequence[str] = ALL, python: str = sys.executable, path: Path | None = ROOT
    ) -> None:
        self._imported, self._python, self._path = imported, python, path
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()  # the end of its input ends it

    def run(
        self,
        words: Sequence[str],
        folder: Path,
        ranks: int = 1,
        kill_at: tuple[str, float] | None = None,
        said_in: Path | None = None,
        **environment: str,
    ) -> Finished:
        """Run ``python <words>`` in ``folder``.

        Args:
            words: a script or ``-m`` and a module, then arguments.
            folder: where.
            ranks: more than one are started as torchrun starts them.
            kill_at: SIGKILL the program and what it has started so many seconds after it has said that text.
            said_in: folder of the files that keep what is said; None: ``folder``.
            environment: further variables.
        """
        said_in = said_in or folder
        launched: list[dict[str, str]] = [{}]
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            launched = [
                {
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting},
                    **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
                }
                for rank in range(ranks)
            ]
        job = {
            "words": list(words),
            "folder": str(folder),
            "said_in": str(said_in),
            "ranks": [{**environment, **one} for one in launched],
            "kill_at": kill_at,
        }
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(job), file=process.stdin, flush=True)
        codes, seconds = json.loads(process.stdout.readline())
        output, errors = (
            "".join(_said(said_in, stream, rank).read_text(errors="replace") for rank in range(ranks))
            for stream in ("output", "errors")
        )
        return Finished(next((code for code in codes if code), 0), output, errors, seconds)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH"):
                environment.pop(name, None)
            if self._path is not None:
                environment["PYTHONPATH"] = str(self._path)
            self._process = subprocess.Popen(
                [self._python, __file__, *self._imported],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        return self._process


def _said(folder: Path, stream: str, rank: int = 0) -> Path:
    """The file with what a rank says on its ``output`` or ``errors``."""
    return folder / f".{stream}{rank}"


def _serve(imported: Sequence[str]) -> None:
    """Fork a process for every rank of every job."""
    for module in imported:
        importlib.import_module(module)
    _warm_up()
    gc.freeze()  # else each fork copies what is imported when it collects garbage
    for line in sys.stdin:
        job = json.loads(line)
        folder, said_in = Path(job["folder"]), Path(job["said_in"])
        children = []
        for rank, environment in enumerate(job["ranks"]):
            files = [_said(said_in, stream, rank) for stream in ("output", "errors")]
            for file in files:
                file.unlink(missing_ok=True)
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)
                _say_in(files)
                _end_as(job["words"], folder, environment)
            children.append(child)
        if job["kill_at"] is not None:
            _kill(children[0], said_in, *job["kill_at"])
        ended = [os.wait4(child, 0) for child in children]
        codes = [os.waitstatus_to_exitcode(status) for _, status, _ in ended]
        print(json.dumps([codes, sum(used.ru_utime + used.ru_stime for *_, used in ended)]), flush=True)


def _warm_up() -> None:
    """Let Hydra, OmegaConf and the config's classes gather what they keep between two compositions.

    And measure what a run reckons its MFU against, which takes each of its ranks one to three seconds, in the
    formats that runs take: bf16 where nothing says which and this processor multiplies it.
    """
    from spikingbrain_train.config.compose import compose_run
    from spikingbrain_train.config.load import to_run_config

    to_run_config(compose_run(["model=tiny_hybrid", "output_dir=anywhere"]))
    if "torch" in sys.modules:
        import torch

        from spikingbrain_train.runtime.accelerator import detect
        from spikingbrain_train.runtime.bf16 import PARAMS_DTYPE, choose_precision
        from spikingbrain_train.training.throughput import measure_peak_tflops

        torch.set_num_threads(1)
        for dtype in {torch.float32, PARAMS_DTYPE[choose_precision(detect("cpu")).precision]}:
            measure_peak_tflops("cpu", dtype)


def _kill(child: int, folder: Path, text: str, delay: float) -> None:
    """SIGKILL the group of a process so long after it has said a text, unless it ends before."""
    deadline = None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if deadline is None and any(
            text in _said(folder, stream).read_text(errors="replace")
            for stream in ("output", "errors")
            if _said(folder, stream).exists()
        ):
            deadline = time.monotonic() + delay
        if deadline is not None and time.monotonic() >= deadline:
            os.killpg(child, signal.SIGKILL)
            return
        time.sleep(0.002)


def _say_in(files: Sequence[Path]) -> None:
    """Write standard output and error to these files; there is nothing to read."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)


def _end_as(words: list[str], folder: Path, environment: Mapping[str, str]) -> NoReturn:
    """Be the program, and end this process as it does, without taking all that is imported apart."""
    code: Any = 0
    try:
        _become(words, folder, environment)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    with suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _become(words: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    """Be the program: raises SystemExit as it does."""
    if "torch" in sys.modules:
        import torch

        # The first call behind a fork makes torch's thread pool anew. Of several threads that do so at
        # once, as when transformers reads weights, some find no pool.
        torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    signal.alarm(SECONDS)
    if "--nproc-per-node" in words:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.SubprocessHandler._popen = _fork_rank  # type: ignore[assignment, method-assign]
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")  # by the agent's thread
    if "spikingbrain_train.pipelines.runner" in sys.modules:
        sys.modules["spikingbrain_train.pipelines.runner"].call = _call  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", module="runpy")  # it sees that the module has been imported
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _call(command: Sequence[str], begun: Callable[[int], None] = lambda pid: None) -> tuple[int, None]:
    """As ``pipelines.runner.call``, with a fork in the same group in the place of a process."""
    signal.alarm(0)  # of all steps together; each command has its own
    child = os.fork()
    if child == 0:
        words = list(command[1:])
        if command[0] != sys.executable:
            words = ["-m", "spikingbrain_train", command[0].removeprefix("spikingbrain-"), *words]
        _end_as(words, Path.cwd(), {})
    begun(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), None


class _Fork:
    """A process that was forked, with what torchrun's agent asks of ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (SECONDS if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("a fork", timeout or SECONDS)
            time.sleep(0.01)
        return code


def _fork_rank(_: object, command: Sequence[str], environment: Mapping[str, str]) -> _Fork:
    """As torchrun's agent starts ``python -u -m <module> <words>``, in a session of its own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        _end_as([*command[command.index("-m") :]], Path.cwd(), environment)
    return _Fork(child)


if __name__ == "__main__":
    del sys.path[0]  # of this file; its modules have names that others have, too
    _serve(sys.argv[1:])
