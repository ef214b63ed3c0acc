"""Writing a rank's shards from threads of its own process, as megatron-core 0.19 does.

megatron-core 0.16 forks a process for every file. A fork copies all locks as they are and none of the threads
that would open them again: those of gloo, of the progress line and of the heartbeats. With torch 2.6 and four
ranks such a writer was seen to wait for ever, and with it all ranks. Writing spends its time outside of
Python's lock, so threads are as fast.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from spikingbrain_train.runtime.patch import Patch

_FORKING_WRITER = "write_preloaded_data_multiproc"


def write_shards_in_threads() -> None:
    """Have megatron-core write without forks from now on, if it would fork."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    if hasattr(FileSystemWriterAsync, _FORKING_WRITER):
        setattr(FileSystemWriterAsync, _FORKING_WRITER, staticmethod(_write_in_threads))


def report_within_the_process() -> None:
    """Have writers report through a queue of this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _write_in_threads(
    transform_list: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], global_results_queue: Any
) -> None:
    """Stands in for ``FileSystemWriterAsync.write_preloaded_data_multiproc``: the same arguments and results.

    Args:
        transform_list: of torch's storage writer.
        use_msc: whether files are opened by the package multistorageclient.
        rank: of this process.
        write_buckets: one for every file.
        global_results_queue: gets {number of the bucket: results}, or the first exception.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(number: int) -> tuple[int, Any]:
        results: queue.Queue[tuple[int, Any]] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()  # which the writer takes from, to say that it is done
        count.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            transform_list, number, write_buckets[number], results, count, True, use_msc=use_msc
        )
        return results.get()

    with ThreadPoolExecutor(max_workers=len(write_buckets), thread_name_prefix="shards") as pool:
        written = dict(pool.map(write, range(len(write_buckets))))
    failures = [result for result in written.values() if isinstance(result, Exception)]
    global_results_queue.put(failures[0] if failures else written)


PATCHES = (
    Patch(
        name="shards_in_threads",
        changes="FileSystemWriterAsync.write_preloaded_data_multiproc writes from threads",
        reason="a process forked for every file inherits locks that nobody opens: with torch 2.6 and four "
        "ranks one was seen to wait for ever",
        apply=write_shards_in_threads,
        versions="megatron-core<0.19",
    ),
    Patch(
        name="writers_report_in_process",
        changes="filesystem_async._results_queue is a queue of this process",
        reason="every rank would spawn a process that manages the queue: seconds, 270 MB, and it outlives a "
        "killed rank; it serves saving from another process, which is not done here",
        apply=report_within_the_process,
    ),
)
