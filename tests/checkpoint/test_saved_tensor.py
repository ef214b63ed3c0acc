"""Tensors in the form of torch.save are written block by block, and read in part where they lie plainly."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from spikingbrain_train.checkpoint import streaming
from spikingbrain_train.checkpoint.data_files import MegatronCheckpointWriter
from spikingbrain_train.checkpoint.saved_tensor import (
    TensorStream,
    append_tensor,
    bytes_of,
    frame_of,
    load_tensor,
    values_begin,
)
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage import file_blocks
from spikingbrain_train.storage.crc32 import combined
from spikingbrain_train.storage.file_blocks import VerifiedFile


@pytest.mark.parametrize("shape", [(300, 200), (40000,), (3, 100, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_make_the_file_of_torch_save(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor = torch.randn(shape).to(dtype)
    path = tmp_path / "file"
    path.write_bytes(b"what was there")
    frame = frame_of(shape, dtype)
    assert frame is not None
    with VerifiedFile(path) as file:
        stream = TensorStream(file, frame, "a tensor")
        for block in tensor.split(7):
            stream.write(block)
        crc32 = stream.end(zlib.crc32(bytes_of(tensor).numpy().data))
    written = path.read_bytes()
    content = written[14:]
    assert written.startswith(b"what was there") and zlib.crc32(content) == crc32
    assert ZipFile(BytesIO(content)).testzip() is None
    assert torch.equal(torch.load(BytesIO(content), weights_only=True), tensor)
    whole = BytesIO()
    torch.save(tensor, whole)
    assert len(whole.getvalue()) == len(content)
    begin = values_begin(path, 14, len(content), shape, dtype)
    assert begin is not None and written[begin : begin + tensor.nbytes] == bytes_of(tensor).numpy().tobytes()


def test_what_stands_around_values_depends_on_shape_and_dtype_alone() -> None:
    shape, dtype = (130, 300), torch.float32
    frame = frame_of(shape, dtype)
    assert frame is not None and frame_of(list(shape), dtype) is frame
    for _ in range(2):
        tensor, whole = torch.randn(shape), BytesIO()
        torch.save(tensor, whole)
        values = bytes_of(tensor).numpy().tobytes()
        made = ZipFile(BytesIO(frame.before + values + frame.after(zlib.crc32(values))))
        of_torch = ZipFile(whole)
        assert made.namelist() == of_torch.namelist()
        for name in made.namelist():
            if not name.endswith("serialization_id"):  # a number drawn from all other checksums
                assert made.read(name) == of_torch.read(name)
    assert frame_of((300, 130), dtype) != frame
    assert frame_of(shape, torch.float64) != frame


@pytest.mark.parametrize(
    "nbytes", [1 << 31, (1 << 32) - 4096, (1 << 32) - 4, 1 << 32, 5 << 30], ids=lambda each: f"{each:,}"
)
def test_tensors_of_many_gigabytes_are_framed(nbytes: int, tmp_path: Path) -> None:
    shape = (nbytes // 4,)
    frame = frame_of(shape, torch.float32)
    assert frame is not None
    crc32 = _crc32_of_zeros(nbytes)
    after = frame.after(crc32)
    path = tmp_path / "file"  # takes next to nothing of the disk: zeros that were never written
    with path.open("wb") as file:
        file.write(frame.before)
        file.seek(nbytes, os.SEEK_CUR)
        file.write(after)
    begin = values_begin(path, 0, path.stat().st_size, shape, torch.float32)
    assert begin == len(frame.before)
    with ZipFile(path) as archive:
        for record in archive.infolist():
            if record.file_size < nbytes:
                archive.read(record)  # which holds it against its checksum
        values = next(record for record in archive.infolist() if record.filename.endswith("/data/0"))
    assert (values.file_size, values.CRC) == (nbytes, crc32)


def _crc32_of_zeros(number: int) -> int:
    """Of so many zero bytes, without reading them."""
    total, doubled, length = 0, zlib.crc32(b"\0"), 1
    while number:
        if number & 1:
            total = combined(total, doubled, length)
        doubled, length, number = combined(doubled, doubled, length), length * 2, number >> 1
    return total


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(3, 5), torch.randn(200, 400)[:, :200], torch.tensor(2.0), torch.empty(0, 7)],
    ids=["small", "not contiguous", "one number", "none"],
)
def test_any_tensor_is_appended(tensor: torch.Tensor, tmp_path: Path) -> None:
    with VerifiedFile(tmp_path / "file") as file:
        for _ in range(2):
            begin = file.position
            crc32 = append_tensor(file, tensor, "a tensor")
    written = (tmp_path / "file").read_bytes()[begin:]
    assert zlib.crc32(written) == crc32
    found = load_tensor(tmp_path / "file", begin, len(written))
    assert torch.equal(found, tensor) and found.untyped_storage().nbytes() == tensor.nbytes


def _saved(make: Callable[[torch.Tensor], object]) -> bytes:
    file = BytesIO()
    torch.save(make(torch.randn(200, 300)), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        lambda tensor: tensor.T,
        lambda tensor: tensor[:, :200],
        lambda tensor: tensor[1:],
        lambda tensor: tensor.double(),
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: {"tensor": tensor},
    ],
    ids=["transposed", "columns", "rows", "another dtype", "a parameter", "no tensor"],
)
def test_what_is_not_laid_out_plainly_is_loaded_whole(
    make: Callable[[torch.Tensor], object], tmp_path: Path
) -> None:
    content = _saved(make)
    (tmp_path / "file").write_bytes(content)
    for shape in ((200, 300), (300, 200), (200, 200), (199, 300)):
        assert values_begin(tmp_path / "file", 0, len(content), shape, torch.float32) is None


def test_a_damaged_file_is_loaded_whole(tmp_path: Path) -> None:
    content = _saved(lambda tensor: tensor)
    for damaged in (
        content[:-30],
        content[:100],
        b"",
        content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_vX"),
    ):
        (tmp_path / "file").write_bytes(damaged)
        assert values_begin(tmp_path / "file", 0, len(damaged), (200, 300), torch.float32) is None


def test_what_comes_back_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = file_blocks.read_exactly

    def flipped(file: file_blocks.FileIO, view: memoryview) -> None:
        read(file, view)
        view[-1] ^= 1

    monkeypatch.setattr(file_blocks, "read_exactly", flipped)
    with (
        pytest.raises(CheckpointError, match="file: a tensor was written, but other bytes are read back"),
        VerifiedFile(tmp_path / "file") as file,
    ):
        append_tensor(file, torch.randn(3), "a tensor")


@pytest.mark.parametrize("once", [False, True])
def test_parts_of_a_large_chunk_are_read_without_the_rest(
    once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, embedding = torch.randn(6, 40, 100), torch.randn(500, 100).bfloat16()
    with MegatronCheckpointWriter(tmp_path) as writer:
        writer.write("experts", experts)
        writer.write("embedding", embedding)
    monkeypatch.setattr(streaming, "load_tensor", None)  # what loads a chunk whole
    reader = streaming.MegatronCheckpointReader(tmp_path, once=once)
    for expert in range(6):
        assert torch.equal(reader.read_region("experts", (expert, 0, 0), (1, 40, 100))[0], experts[expert])
    assert torch.equal(reader.read_region("embedding", (20, 30), (200, 40)), embedding[20:220, 30:70])
    assert torch.equal(reader.read_region("embedding", (400, 0), (200, 100))[:100], embedding[400:])
    reader.finish("experts")


@pytest.mark.parametrize("rows", [500, 20], ids=["all rows", "some rows"])
def test_a_flipped_bit_shows_when_the_rows_have_been_read(rows: int, tmp_path: Path) -> None:
    """Also one behind the rows that are asked for, as the padding of a vocabulary is."""
    with MegatronCheckpointWriter(tmp_path) as writer:
        writer.write("embedding", torch.randn(500, 100))
    data = bytearray((tmp_path / "__0_0.distcp").read_bytes())
    data[len(data) * 3 // 4] ^= 1
    (tmp_path / "__0_0.distcp").write_bytes(data)
    reader = streaming.MegatronCheckpointReader(tmp_path, once=True)
    for first in range(0, rows, 10):
        reader.read_region("embedding", (first, 0), (10, 100))
    with pytest.raises(CheckpointError, match="__0_0.distcp is damaged or of another save"):
        reader.finish("embedding")
    with pytest.raises(CheckpointError, match="__0_0.distcp is damaged or of another save"):
        streaming.MegatronCheckpointReader(tmp_path, once=True).read_region("embedding", (10, 0), (10, 100))
