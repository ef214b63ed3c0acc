"""Folders of files that ranks send each other, from memory to memory and in blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.storage.file_blocks import read_exactly, write_all

_BLOCK_BYTES = 64 << 20


def neighbour_of(rank: int, world_size: int, local_world_size: int) -> int:
    """The rank that keeps a copy for ``rank``: that of the same place on the next host, or the next rank."""
    return (rank + (local_world_size if local_world_size < world_size else 1)) % world_size


class FirstError:
    """The first error of a rank's files, held back while others wait for the rank."""

    def __init__(self) -> None:
        self._error: OSError | None = None

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within, an OSError ends the block and nothing else."""
        try:
            yield
        except OSError as error:
            self._error = self._error or error

    def throw(self) -> None:
        """Raise it, if there was one."""
        if self._error is not None:
            raise self._error


class Exchange:
    """Sends a folder to one rank while another one's is received; a part that is missing is as good as empty.

    Args:
        group: a gloo group of all ranks that nobody else uses at the same time.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def pass_on(self, folder: Path | None, to: int, into: Path | None, source: int) -> None:
        """Send ``folder`` to rank ``to`` and receive what rank ``source`` sends; all ranks call it together.

        Without ``folder`` nothing is sent, without ``into`` what comes is let go. What this rank cannot read
        or write is raised when all is sent and received: until then the others would wait for it.

        Raises:
            OSError: a file cannot be read or written.
            RuntimeError: a rank is gone.
        """
        first = FirstError()
        files: list[tuple[str, int]] = []
        if folder is not None:
            with first.held_back():
                files = _files(folder)
        theirs = self._swap_lists(files, to, source)
        blocks = max(_blocks(files), _blocks(theirs))
        sending, receiving = _Reader(folder, files), _Writer(into, theirs)
        for _ in range(blocks):
            work: Any = None
            if (size := sending.next_size()) is not None:
                block = torch.zeros(size, dtype=torch.uint8)
                with first.held_back():
                    sending.read(block)
                work = torch.distributed.isend(block, to, group=self._group)
            if (size := receiving.next_size()) is not None:
                buffer = torch.empty(size, dtype=torch.uint8)
                torch.distributed.recv(buffer, source, group=self._group)
                with first.held_back():
                    receiving.write(buffer)
            if work is not None:
                work.wait()
        first.throw()

    def send(self, folder: Path | None, to: int) -> None:
        """Send a folder, or word that there is none."""
        files = [] if folder is None else _files(folder)
        _send_list(files, to, self._group)
        if folder is not None:
            reader = _Reader(folder, files)
            while (size := reader.next_size()) is not None:
                block = torch.empty(size, dtype=torch.uint8)
                reader.read(block)
                torch.distributed.send(block, to, group=self._group)

    def receive(self, into: Path | None, source: int) -> bool:
        """Receive a folder, or let it go; returns whether there was one.

        Raises:
            OSError: a file cannot be written, when all is received.
            RuntimeError: the rank is gone.
        """
        first = FirstError()
        files = _receive_list(source, self._group)
        writer = _Writer(into, files)
        while (size := writer.next_size()) is not None:
            buffer = torch.empty(size, dtype=torch.uint8)
            torch.distributed.recv(buffer, source, group=self._group)
            with first.held_back():
                writer.write(buffer)
        first.throw()
        return bool(files)

    def _swap_lists(self, files: list[tuple[str, int]], to: int, source: int) -> list[tuple[str, int]]:
        content = _as_tensor(files)
        size = torch.tensor([content.numel()])
        theirs = torch.zeros(1, dtype=torch.int64)
        work: Any = torch.distributed.isend(size, to, group=self._group)
        torch.distributed.recv(theirs, source, group=self._group)
        work.wait()
        received = torch.empty(int(theirs), dtype=torch.uint8)
        work = torch.distributed.isend(content, to, group=self._group)
        torch.distributed.recv(received, source, group=self._group)
        work.wait()
        return _as_list(received)


def _files(folder: Path) -> list[tuple[str, int]]:
    """Names and bytes of the files in a folder, the small ones first."""
    found = [(path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file()]
    return sorted(found, key=lambda each: (each[1], each[0]))


def _as_tensor(files: list[tuple[str, int]]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(files).encode()), dtype=torch.uint8)


def _as_list(content: Tensor) -> list[tuple[str, int]]:
    return [(Path(name).name, int(size)) for name, size in json.loads(bytes(content.tolist()))]


def _send_list(files: list[tuple[str, int]], to: int, group: ProcessGroup) -> None:
    content = _as_tensor(files)
    torch.distributed.send(torch.tensor([content.numel()]), to, group=group)
    torch.distributed.send(content, to, group=group)


def _receive_list(source: int, group: ProcessGroup) -> list[tuple[str, int]]:
    size = torch.zeros(1, dtype=torch.int64)
    torch.distributed.recv(size, source, group=group)
    content = torch.empty(int(size), dtype=torch.uint8)
    torch.distributed.recv(content, source, group=group)
    return _as_list(content)


def _blocks(files: list[tuple[str, int]]) -> int:
    return sum(-(-size // _BLOCK_BYTES) for _, size in files)


class _Reader:
    """Files of a folder, one block after the other."""

    def __init__(self, folder: Path | None, files: list[tuple[str, int]]) -> None:
        self._folder, self._pieces = folder, _pieces(files)

    def next_size(self) -> int | None:
        return self._pieces[0].size if self._pieces else None

    def read(self, block: Tensor) -> None:
        piece = self._pieces.pop(0)
        if self._folder is None:
            return
        with (self._folder / piece.name).open("rb", buffering=0) as file:
            file.seek(piece.at)
            try:
                read_exactly(file, block.numpy().data)
            except EOFError as error:
                raise OSError(f"{self._folder / piece.name}: {error}") from error


class _Writer:
    """The same on the other side: old files are written over, and others removed."""

    def __init__(self, folder: Path | None, files: list[tuple[str, int]]) -> None:
        self._folder, self._pieces = folder, _pieces(files)
        if folder is not None:
            for left in [path for path in folder.iterdir() if path.name not in dict(files)]:
                left.unlink()

    def next_size(self) -> int | None:
        return self._pieces[0].size if self._pieces else None

    def write(self, block: Tensor) -> None:
        piece = self._pieces.pop(0)
        if self._folder is None:
            return
        path = self._folder / piece.name
        with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
            file.truncate(piece.of_file)
            file.seek(piece.at)
            write_all(file, block.numpy().data)


class _Piece(NamedTuple):
    name: str
    at: int
    size: int
    of_file: int
    """Bytes of the whole file."""


def _pieces(files: list[tuple[str, int]]) -> list[_Piece]:
    return [
        _Piece(name, at, min(_BLOCK_BYTES, size - at), size)
        for name, size in files
        for at in range(0, size, _BLOCK_BYTES)
    ]
