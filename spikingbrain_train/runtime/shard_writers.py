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

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

_FORKING_WRITER = "write_preloaded_data_multiproc"


def write_shards_in_threads() -> None:
    """Have megatron-core write without forks from now on. Harmless where it does anyway (0.19)."""
    if hasattr(FileSystemWriterAsync, _FORKING_WRITER):
        setattr(FileSystemWriterAsync, _FORKING_WRITER, staticmethod(_write_in_threads))


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
