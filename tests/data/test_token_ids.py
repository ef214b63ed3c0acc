"""Tokens beyond the model's vocabulary are found before training, once for each file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.data import token_ids
from spikingbrain_train.data.indexed import TokenFile, open_indexed_dataset
from spikingbrain_train.errors import DataError
from spikingbrain_train.reporting.activity import Activity
from spikingbrain_train.training.data_check import check_tokens_together
from tests.distributed.small_runs import MODEL, run_config

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups
    from tests.distributed.pool import RankPool

TENSOR_PARALLEL = ParallelConfig(tensor_model_parallel_size=2)
VOCABULARY = 20
GOOD = [[5, 6, 7, 0], [8, 0], [], [9, 10, 11, 12, 19, 0]]


def write_foreign(folder: Path, documents: Sequence[Sequence[int]], dtype: type = np.int32) -> str:
    """A dataset as Megatron-LM's own tool writes it: without a sidecar."""
    prefix = str(folder / "foreign")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.asarray(document, dtype=dtype), [len(document)])
    builder.finalize(prefix + ".idx")
    return prefix


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Datasets that are looked at while the test runs, in a process that knows of none."""
    looked_at: list[str] = []
    scan = token_ids.scan

    def counted(dataset: TokenFile, *arguments: object, **options: bool) -> token_ids.IdRange:
        looked_at.append(dataset.prefix)
        return scan(dataset, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(token_ids, "scan", counted)
    monkeypatch.setattr(token_ids, "_known", {})
    monkeypatch.setattr(token_ids, "_CHUNK_TOKENS", 3)
    return looked_at


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_tokens_of_the_vocabulary_pass_in_every_type(tmp_path: Path, scans: list[str], dtype: type) -> None:
    open_indexed_dataset(write_foreign(tmp_path, GOOD, dtype), VOCABULARY)


@pytest.mark.parametrize(
    ("documents", "document", "token"),
    [
        ([*GOOD, [3, 20, 999]], 4, 20),
        ([[-1, 3], *GOOD], 0, -1),
        ([[1], [], [2**31 - 1]], 2, 2**31 - 1),
    ],
)
def test_the_first_token_beyond_the_vocabulary_is_named(
    tmp_path: Path, scans: list[str], documents: list[list[int]], document: int, token: int
) -> None:
    prefix = write_foreign(tmp_path, documents)
    sentence = rf"foreign\.bin: document {document} \(counted from 0\) holds the token id {token}, .* 0 to 19"
    for _ in range(2):  # seen, and remembered
        with pytest.raises(DataError, match=sentence):
            open_indexed_dataset(prefix, VOCABULARY)
    open_indexed_dataset(prefix)


def test_a_file_is_looked_at_once_and_again_when_it_changes(
    tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_foreign(tmp_path, GOOD)
    for vocab_size in (VOCABULARY, VOCABULARY, 1000):
        open_indexed_dataset(prefix, vocab_size)
    assert len(scans) == 1
    token_ids._known.clear()  # as in another process
    open_indexed_dataset(prefix, VOCABULARY)
    assert len(scans) == 1
    with pytest.raises(DataError, match="token id 19"):
        open_indexed_dataset(prefix, 19)
    write_foreign(tmp_path, [*GOOD[:3], [9, 10, 11, 12, 18, 0]])
    os.utime(prefix + ".bin", ns=(1, 1))
    open_indexed_dataset(prefix, 19)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in list(tmp_path.glob("foreign.*")):
        path.rename(moved / path.name)
    before = len(scans)
    token_ids._known.clear()
    open_indexed_dataset(moved / "foreign", 19)
    assert len(scans) == before


@pytest.mark.parametrize("note", ["", "[]", "{", '{"x": 1}', None])
def test_a_note_of_another_file_or_none_is_not_believed(
    tmp_path: Path, scans: list[str], note: str | None
) -> None:
    prefix = write_foreign(tmp_path, [[1, 25]])
    if note is None:
        status = os.stat(prefix + ".bin")
        identity = f"foreign.bin {status.st_size} {status.st_mtime_ns + 1} int32"
        note = json.dumps({identity: {"smallest": 0, "largest": 1}})
    Path(prefix + ".checked").write_text(note)
    with pytest.raises(DataError, match="token id 25"):
        open_indexed_dataset(prefix, VOCABULARY)


def test_a_note_of_the_same_bytes_as_other_numbers_is_not_believed(tmp_path: Path, scans: list[str]) -> None:
    prefix = write_foreign(tmp_path, [[1, 0, 1, 0]], np.uint16)
    time = os.stat(prefix + ".bin").st_mtime_ns
    open_indexed_dataset(prefix, VOCABULARY)
    write_foreign(tmp_path, [[1, 1]], np.int32)
    os.utime(prefix + ".bin", ns=(time, time))
    open_indexed_dataset(prefix, VOCABULARY)
    assert len(scans) == 2


def test_known_data_is_read_up_to_the_first_token_beyond_the_vocabulary(
    tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_foreign(tmp_path, [range(12)])
    open_indexed_dataset(prefix, VOCABULARY)
    starts: list[int] = []
    read = TokenFile.read
    monkeypatch.setattr(
        TokenFile, "read", lambda self, start, count: starts.append(start) or read(self, start, count)
    )
    for _ in range(2):
        starts.clear()
        with pytest.raises(DataError, match="token id 4"):
            open_indexed_dataset(prefix, 4)
        assert starts == [0, 3, 4]  # parts of three tokens, and the one to name
    open_indexed_dataset(prefix, VOCABULARY)
    assert len(scans) == 3


def test_a_note_is_written_beside_the_unfinished_one_of_another_container(
    tmp_path: Path, scans: list[str]
) -> None:
    """Their process ids may be equal."""
    prefix = write_foreign(tmp_path, GOOD)
    (tmp_path / f".foreign.checked.tmp-{os.getpid()}").mkdir()
    open_indexed_dataset(prefix, VOCABULARY)
    assert list(json.loads(Path(prefix + ".checked").read_text()).values()) == [
        {"smallest": 0, "largest": 19}
    ]
    assert len(list(tmp_path.glob(".*"))) == 1


def test_numbers_that_are_no_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"foreign\.bin holds no whole numbers"):
        open_indexed_dataset(write_foreign(tmp_path, GOOD, np.float32))


def _check_on_this_rank(
    groups: ProcessGroups, prefix: str, vocab_size: int, folder: Path
) -> tuple[str, list[str]]:
    looked_at: list[str] = []

    def activity(what: str, total: int, unit: str) -> nullcontext[Activity]:
        looked_at.append(what)
        return nullcontext(Activity(None, what, total, unit))

    token_ids._known.clear()
    try:
        check_tokens_together([prefix], vocab_size, groups, folder, activity)
    except DataError as error:
        return str(error), looked_at
    return "", looked_at


def test_ranks_share_the_work_and_come_to_one_end(ranks: RankPool, tmp_path: Path) -> None:
    def check(vocab_size: int) -> list[tuple[str, list[str]]]:
        return ranks.run(
            _check_on_this_rank, prefix, vocab_size, tmp_path / "run", world_size=2, parallel=ParallelConfig()
        )

    prefix = write_foreign(tmp_path, [range(50), range(50, 100)])
    Path(prefix + ".checked").mkdir()  # nothing may be written beside the data
    assert [error for error, _ in check(100)] == ["", ""]
    assert check(101) == [("", []), ("", [])]  # remembered in the run's folder
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checked_data.json"]
    for vocab_size, document in ((99, 1), (7, 0)):
        (error, _), other = check(vocab_size)
        assert error == other[0]
        assert f"document {document} (counted from 0) holds the token id {vocab_size}" in error


def test_a_dataset_of_fewer_tokens_than_ranks_is_checked(ranks: RankPool, tmp_path: Path) -> None:
    prefix = write_foreign(tmp_path, [[5]])
    dataset = TokenFile(prefix)
    nothing = token_ids.scan(dataset, VOCABULARY, 0, 0)
    torch.tensor([nothing.smallest, nothing.largest, -nothing.smallest, -nothing.largest], dtype=torch.int64)
    for vocab_size, sentence in ((VOCABULARY, ""), (5, "document 0 (counted from 0) holds the token id 5")):
        found = ranks.run(
            _check_on_this_rank, prefix, vocab_size, tmp_path, world_size=2, parallel=ParallelConfig()
        )
        assert all(sentence in error and bool(sentence) == bool(error) for error, _ in found)


def _train_on_this_rank(groups: ProcessGroups, output_dir: Path, prefix: str) -> str:
    from spikingbrain_train.training.trainer import Trainer

    try:
        Trainer(run_config(output_dir, Path(prefix), parallel=TENSOR_PARALLEL), groups)
    except DataError as error:
        return str(error)
    return "trains"


@pytest.mark.parametrize("token", [MODEL.vocab_size, 999, -1])
def test_tensor_parallel_training_does_not_start_on_foreign_tokens(
    ranks: RankPool, tmp_path: Path, token: int
) -> None:
    """Token 130 would find a row: one that pads the vocabulary for tensor parallelism."""
    prefix = write_foreign(tmp_path, [[1] * 100, [2, token] * 10])
    errors = ranks.run(_train_on_this_rank, tmp_path / "out", prefix, world_size=2, parallel=TENSOR_PARALLEL)
    assert errors[0] == errors[1]
    assert f"document 1 (counted from 0) holds the token id {token}" in errors[0]
