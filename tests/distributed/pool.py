"""A pool of persistent gloo ranks for tests.

A distributed test is one module-level function that runs on every rank::

    def _all_ranks_agree(groups: ProcessGroups, start: float) -> float:
        ...
        return loss


    def test_all_ranks_agree(ranks: RankPool) -> None:
        losses = ranks.run(
            _all_ranks_agree, 1.0, world_size=2, parallel=ParallelConfig(tensor_model_parallel_size=2)
        )
        assert losses[0] == losses[1]

Importing torch and megatron-core takes seconds, so the processes live as long as the test session: a world
of n ranks is the first n of them, with process groups of its own that are formed before the function runs and
left after it, or taken over by the next one (:func:`shares_its_world`). Each rank has one torch thread. Use
the ``ranks`` fixture of tests/conftest.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spikingbrain_train.config.parallel import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from spikingbrain_train.parallel.process_groups import ProcessGroups

SEED = 1234
PRELOADED = ("spikingbrain_train.training.trainer", "torch._dynamo")
"""Torch's optimizers import its compiler, for a second, when the first one is made."""
_START_SECONDS = 240.0  # importing torch and megatron-core on a busy machine
_GRACE_SECONDS = 3.0  # how long the other ranks may still report once one has failed
_LOG_LINES = 25
# Some models outlive their job: where a module keeps a tensor of the last forward pass (megatron-core's token
# dispatchers do), its graph refers to the model out of sight of Python's collector. With each of them live
# the process groups of its world, two threads and some sockets a group; a rank is replaced before that
# slows it down.
_MAX_THREADS = 250
_SHOWS_STACKS = signal.SIGUSR2  # SIGUSR1 is held back by a run in training, which is asked to stop by it
_READY = "ready"
_LEAVE = "leave"


class RankFailure(AssertionError):
    """At least one rank raised, died or hung; the message says which and shows what it left behind."""


@dataclass
class _Rank:
    process: BaseProcess
    connection: Connection
    log: Path


def shares_its_world(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that leaves its groups as it has found them, and nothing under way, unless it raises.

    The next such function on as many ranks with the same parallel degrees takes them over: to form them and
    leave them takes four ranks as long as a step or two. Generators are seeded anew all the same.
    """
    vars(function)["shares_its_world"] = True
    return function


@dataclass(frozen=True)
class _World:
    """Ranks that are in groups."""

    size: int
    degrees: tuple[int | None, ...]
    timeout: float
    """Seconds, of its collectives."""


@dataclass(frozen=True)
class _Job:
    """One call of a test function, as it travels to the workers."""

    module_name: str
    module_file: str
    function: str
    arguments: bytes
    parallel: ParallelConfig | None
    timeout: float
    takes_over: bool
    """Whether the rank is in its groups already."""
    stays: bool
    """Whether it stays in them."""


@dataclass(frozen=True)
class _Report:
    """What a worker sends back: a pickled result, or a traceback."""

    result: bytes | None
    failure: str | None = None
    threads: int = 0
    """Threads that the worker has afterwards."""


class RankPool:
    """Processes that wait for test functions. Started when first needed, reused, replaced after a failure or
    when they have gathered too many threads."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._world: _World | None = None
        """What the last function has left to the next one."""
        self._store: TCPStore | None = None
        self._logs = tempfile.TemporaryDirectory(prefix="rank-pool-")

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        world_size: int,
        parallel: ParallelConfig | None = None,
        timeout: float = 120.0,
    ) -> list[Any]:
        """Call ``function(groups, *arguments)`` on every rank and return the results in rank order.

        Args:
            function: defined at the top level of a test module, which every rank imports.
            arguments: picklable.
            world_size: number of ranks.
            parallel: degrees of the groups to form. None forms none: the function is called without
                ``groups``, in the environment that a launcher makes, and can call
                ``process_groups.initialize`` itself.
            timeout: seconds until the ranks count as hanging; starting the processes does not count.

        Raises:
            RankFailure: a rank raised, died, or did not finish in time. The ranks involved are replaced.
        """
        from torch.distributed import TCPStore

        world = None
        if parallel is not None and hasattr(function, "shares_its_world"):
            world = _World(world_size, _degrees(parallel), timeout)
        takes_over = world is not None and world == self._world
        if not takes_over:
            self._leave_world()
            # The pool plays torchrun's agent and hosts the store, so no rank has to win a race for a port.
            # Each world needs a fresh one: keys of the last would send ranks to addresses that are gone.
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._start_missing(world_size)
        assert self._store is not None
        job = _make_job(function, arguments, parallel, timeout, takes_over, stays=world is not None)
        for rank in range(world_size):
            environment = _launcher_environment(rank, world_size, self._store.port)
            self._ranks[rank].connection.send((job, environment))
        self._world = None  # until all have done it
        reports = self._collect(world_size, timeout)
        problems = self._problems(reports, world_size, timeout)
        if problems:
            self._stop(self._ranks[:world_size])
            del self._ranks[:world_size]
            raise RankFailure("\n\n".join(problems))
        if max(reports[rank].threads for rank in range(world_size)) > _MAX_THREADS:
            self._stop(self._ranks[:world_size])
            del self._ranks[:world_size]
        else:
            self._world = world
        return [pickle.loads(reports[rank].result or b"") for rank in range(world_size)]

    def close(self) -> None:
        """End every process."""
        self._stop(self._ranks)
        self._ranks.clear()
        self._logs.cleanup()

    def _leave_world(self) -> None:
        """Have the ranks leave the groups that they are still in."""
        if self._world is not None:
            ranks = self._ranks[: self._world.size]
            self._world = None
            for rank in ranks:
                rank.connection.send(_LEAVE)
            for rank in ranks:
                assert _says_ready(rank.connection), "a rank has not left its groups"

    def _start_missing(self, world_size: int) -> None:
        # One process imports the slow packages once and forks every rank from there, replacements too.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        started = []
        while len(self._ranks) < world_size:
            ours, theirs = context.Pipe()
            descriptor, log = tempfile.mkstemp(dir=self._logs.name, suffix=".log")
            os.close(descriptor)
            process = context.Process(target=_serve, args=(theirs, log), name="gloo-rank")
            with _environment({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}):
                process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, Path(log)))
            started.append(self._ranks[-1])
        for worker in started:
            if not worker.connection.poll(_START_SECONDS) or not _says_ready(worker.connection):
                log_tail = _tail(worker.log)
                self._stop(self._ranks)
                self._ranks.clear()
                raise RankFailure(f"a rank did not start within {_START_SECONDS:g} s:\n{log_tail}")

    def _collect(self, world_size: int, timeout: float) -> dict[int, _Report]:
        """Reports by rank; ranks that died or hang are missing."""
        reports: dict[int, _Report] = {}
        waiting = {self._ranks[rank].connection: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(waiting), left):
                rank = waiting.pop(ready)  # type: ignore[arg-type]
                with contextlib.suppress(EOFError, ConnectionResetError):
                    reports[rank] = ready.recv()  # type: ignore[union-attr]
                if rank not in reports or reports[rank].failure:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return reports

    def _problems(self, reports: dict[int, _Report], world_size: int, timeout: float) -> list[str]:
        raised, died, hung = [], [], []
        for rank in range(world_size):
            title, worker = f"rank {rank} of {world_size}", self._ranks[rank]
            if rank in reports:
                if failure := reports[rank].failure:
                    # A command's sentence is what it printed, not what it raised.
                    is_exit = failure.rstrip().rpartition("\n")[2].startswith("SystemExit")
                    said = _tail(worker.log) if is_exit else ""
                    raised.append(f"{title} failed:\n{failure}{said}")
                continue
            worker.process.join(0.5)
            if worker.process.exitcode is not None:
                died.append(f"{title} died with exit code {worker.process.exitcode}:\n{_tail(worker.log)}")
            else:
                where = _where_it_hangs(worker)
                hung.append(f"{title} did not finish within {timeout:g} s:\n{where}")
        if raised or died:  # ranks that wait for a failed one are a consequence
            hung = [problem.splitlines()[0].split(" did not")[0] + " was still waiting." for problem in hung]
        return raised + died + hung

    @staticmethod
    def _stop(ranks: list[_Rank]) -> None:
        for rank in ranks:
            rank.connection.close()
            rank.process.kill()
        for rank in ranks:
            rank.process.join()


def _degrees(parallel: ParallelConfig) -> tuple[int | None, ...]:
    """What groups depend on."""
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
        parallel.data_parallel_size,
    )


def _make_job(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    parallel: ParallelConfig | None,
    timeout: float,
    takes_over: bool,
    stays: bool,
) -> _Job:
    module = sys.modules[function.__module__]
    assert module.__file__ is not None and function.__qualname__ == function.__name__, (
        f"{function.__qualname__} must be defined at the top level of a test module"
    )
    return _Job(
        module.__name__,
        module.__file__,
        function.__name__,
        pickle.dumps(arguments),
        parallel,
        timeout,
        takes_over,
        stays,
    )


def _launcher_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _says_ready(connection: Connection) -> bool:
    with contextlib.suppress(EOFError, ConnectionResetError):
        return connection.recv() == _READY
    return False


def _where_it_hangs(worker: _Rank) -> str:
    if worker.process.pid is not None:
        os.kill(worker.process.pid, _SHOWS_STACKS)  # in the worker's log
        time.sleep(0.5)
    return _tail(worker.log)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]) or "(no output)"


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Any:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _serve(connection: Connection, log: str) -> None:
    """A worker: run jobs until the pool hangs up."""
    output = open(log, "a", buffering=1)  # noqa: SIM115  (open for as long as the process lives)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    faulthandler.register(_SHOWS_STACKS, file=output, all_threads=True)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: collections after each job look at what the job left only
    connection.send(_READY)
    kept: list[ProcessGroups] = []
    while True:
        try:
            received = connection.recv()
        except (EOFError, OSError):
            return
        if received == _LEAVE:
            kept.clear()
            _clean_up(kept)
            connection.send(_READY)
            continue
        report = _run(*received, kept)
        connection.send(replace(report, threads=len(os.listdir("/proc/self/task"))))


def _run(job: _Job, environment: dict[str, str], kept: list[ProcessGroups]) -> _Report:
    """Do a job; ``kept`` holds the groups that this rank is in between two of them."""
    from spikingbrain_train.parallel import process_groups
    from spikingbrain_train.runtime.accelerator import detect

    try:
        with _environment(environment):
            function = getattr(_import(job.module_name, job.module_file), job.function)
            arguments = pickle.loads(job.arguments)
            if job.parallel is None:
                return _Report(pickle.dumps(function(*arguments)))
            if job.takes_over:
                (groups,) = kept
                _begin_as_if_formed(job.parallel)
            else:
                groups = process_groups.initialize(
                    job.parallel, detect("cpu"), seed=SEED, timeout_minutes=job.timeout / 60
                )
            result = pickle.dumps(function(groups, *arguments))
            kept[:] = [groups] if job.stays else []
            return _Report(result)
    except BaseException:
        kept.clear()
        return _Report(None, traceback.format_exc())
    finally:
        _clean_up(kept)


def _begin_as_if_formed(parallel: ParallelConfig) -> None:
    """What else :func:`process_groups.initialize` sets, and a function may have changed."""
    import torch
    from megatron.core import parallel_state

    from spikingbrain_train.parallel import process_groups

    torch.set_num_threads(1)
    first = None if parallel.virtual_pipeline_model_parallel_size is None else 0
    parallel_state.set_virtual_pipeline_model_parallel_rank(first)
    process_groups._seed(SEED)


def _clean_up(kept: list[ProcessGroups]) -> None:
    """Leave all groups but those that are kept, and let go of models."""
    from spikingbrain_train.parallel import process_groups

    if not kept:
        process_groups.destroy()
    _forget_loss_scale()
    gc.collect()  # models are cyclic garbage that holds process groups, with their threads and sockets


def _forget_loss_scale() -> None:
    """megatron-core keeps the scale of a router's losses for good, in the shape of whoever set it first."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def _import(name: str, file: str) -> ModuleType:
    """Import a test module under the name it has in the pytest process, wherever it lies."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
