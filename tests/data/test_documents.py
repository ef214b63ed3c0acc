from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spikingbrain_train.data.documents as documents_module
from spikingbrain_train.data.documents import PYDOC_TOPICS, cut_text, find_sources
from spikingbrain_train.data.folders import LeftOut
from spikingbrain_train.data.raw_document import RawDocument
from spikingbrain_train.errors import DataError

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda text: not text.isspace()
)
FILES = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(*inputs: str | Path, text_key: str = "text", max_text_chars: int | None = None) -> list[str]:
    sources = find_sources([str(given) for given in inputs])
    return [d.text(text_key) for source in sources for d in source.read(max_text_chars)]


def jsonl(texts: list[str], ensure_ascii: bool = True) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=ensure_ascii).encode() + b"\n" for text in texts)


@FILES
@given(st.lists(WORDS, min_size=1, max_size=20), st.booleans(), st.integers(1, 64))
def test_every_compression_gives_the_same_documents(
    tmp_path: Path, texts: list[str], ensure_ascii: bool, block: int
) -> None:
    content = jsonl(texts, ensure_ascii)
    half = len(content) // 2
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    compressor = zstandard.ZstdCompressor()
    (tmp_path / "a.jsonl.zst").write_bytes(
        compressor.compress(content[:half]) + compressor.compress(content[half:])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "_BLOCK_BYTES", 4 * block)  # lines and frames that cross blocks
        for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
            assert read(tmp_path / name) == texts


BAD_LINES: list[tuple[bytes, str]] = [
    (b"", "the line is empty"),
    (b"   ", "the line is empty"),
    (b'{"text": "cut', "not a JSON object"),
    (b"plain words", "not a JSON object"),
    (b'["a"]', "a JSON list instead of an object"),
    (b'"a"', "a JSON str instead of an object"),
    (b'{"content": "a", "id": 3}', r"no field 'text' \(fields: content, id\): name the text with --text-key"),
    (b'{"text": 3}', "the field 'text' is not a string"),
    (b'{"text": null}', "the field 'text' is not a string"),
    (b'{"text": ""}', "the document is empty"),
    (b'{"text": " \\n"}', "the document is empty"),
    (b'{"text": "\\ud800"}', "an unpaired surrogate"),
    (b'{"text": "\xff"}', "not valid UTF-8"),
    (b"[" * 100_000, "not a JSON object"),
    (b"\x00", "not a JSON object"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, bad: bytes, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(jsonl(["good"] * 16) + bad + b"\n" + jsonl(["good"]))
    with pytest.raises(DataError, match=f"^{path}:17: .*{reason}"):
        read(path)


@FILES
@given(st.binary(min_size=1, max_size=200))
def test_random_bytes_never_raise_anything_but_data_errors(tmp_path: Path, content: bytes) -> None:
    for name in ("r.jsonl", "r.jsonl.gz", "r.jsonl.zst", "r.txt", "r.txt.gz"):
        (tmp_path / name).write_bytes(content)
        try:
            texts = read(tmp_path / name)
        except DataError as error:
            assert str(tmp_path / name) in str(error)
        else:
            assert all(text.strip() for text in texts)


@pytest.mark.parametrize("name", ["e.jsonl", "e.jsonl.gz", "e.jsonl.zst", "e.txt", "e.md.zst"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    pack: dict[str, Any] = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    (tmp_path / name).write_bytes(pack.get(Path(name).suffix, bytes)(b""))
    with pytest.raises(DataError, match=f"{name} is empty"):
        read(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_compressed_file_is_refused_instead_of_ending_early(tmp_path: Path, suffix: str) -> None:
    content = jsonl([f"document {i} {hash(i * 7919)}" for i in range(5000)])
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.ZstdCompressor().compress(content)
    path = tmp_path / f"cut.jsonl{suffix}"
    for kept in (len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:kept])
        with pytest.raises(DataError, match="cut.jsonl.* is damaged or cut short"):
            read(path)


def test_line_ends_byte_order_mark_and_a_missing_last_line_feed_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}')
    assert read(path) == ["a", "b"]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    assert read(tmp_path / "book.txt") == ["one\n\ntwo\n"]


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i} " + "word " * 20 for i in range(10)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    pieces = read(tmp_path / "book.txt", max_text_chars=300)
    assert len(pieces) > 3
    assert all(piece.startswith("paragraph") for piece in pieces)


@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 40))
def test_cutting_loses_only_white_space(text: str, max_chars: int) -> None:
    pieces = list(cut_text(text, max_chars))
    assert all(0 < len(piece) <= max_chars for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_folders_and_globs_are_sorted_and_files_count_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.jsonl", "ignored.bin"):
        (tmp_path / name).write_bytes(jsonl([name]) if name.endswith("jsonl") else name.encode())
    everything = ["a.txt", "b.txt", "deep/c.jsonl"]
    assert read(tmp_path) == everything
    assert read(tmp_path / "b.txt", tmp_path) == ["b.txt", "a.txt", "deep/c.jsonl"]
    assert read(str(tmp_path / "*.txt")) == ["a.txt", "b.txt"]
    assert read(str(tmp_path / "**" / "*.*l")) == ["deep/c.jsonl"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.jsonl", "no file, folder or glob match"),
        ("nothing-*.txt", "no file, folder or glob match"),
        ("table.arrow", "unsupported type: give .jsonl"),
        ("folder", "holds no .jsonl"),
    ],
)
def test_inputs_that_give_nothing_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "table.arrow").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=reason):
        read(tmp_path / name)


def test_pydoc_topics_are_those_of_the_standard_library() -> None:
    assert read(PYDOC_TOPICS) == [topics[key] for key in sorted(topics)]
    assert find_sources([PYDOC_TOPICS])[0].size == sum(len(text.encode()) for text in topics.values())


def test_positions_reach_the_size_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(jsonl([str(i) for i in range(1000)])))
    found: list[RawDocument] = list(find_sources([str(path)])[0].read())
    assert [d.position for d in found] == sorted(d.position for d in found)
    assert found[-1].position == path.stat().st_size


def left_out(*inputs: str | Path) -> list[str]:
    noted = LeftOut()
    find_sources([str(given) for given in inputs], noted)
    return noted.describe()


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    corpus, real = tmp_path / "corpus", tmp_path / "real"
    for path, text in ((corpus / "c.jsonl", "here"), (real / "deep/r.jsonl", "there")):
        path.parent.mkdir(parents=True)
        path.write_bytes(jsonl([text]))
    (corpus / "linked").symlink_to("../real")
    (real / "deep/up").symlink_to("../..")
    (corpus / "self").symlink_to(".")
    (corpus / "copy.jsonl").symlink_to("c.jsonl")
    assert sorted(read(corpus)) == ["here", "there"]
    assert not left_out(corpus)
    assert sorted(read(str(corpus / "*"))) == ["here", "there"]


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "table.arrow").write_bytes(b"PAR1")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    for name in (".ipynb_checkpoints", "deep/.ipynb_checkpoints"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a-checkpoint.txt").write_text("a copy")
    assert read(tmp_path) == ["a"]
    assert left_out(tmp_path, tmp_path) == [
        f"not read: 2 x hidden folder, first {tmp_path}/.ipynb_checkpoints",
        f"not read: 2 x link to nothing, first {tmp_path}/gone.txt",
        f"not read: 1 x file of another type, first {tmp_path}/table.arrow",
    ]
    assert read(tmp_path / ".ipynb_checkpoints") == ["a copy"]  # who names it wants it
    assert left_out(str(tmp_path / "*.txt")) == [f"not read: 2 x link to nothing, first {tmp_path}/gone.txt"]


def test_a_pipe_is_no_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "to_pipe.txt").symlink_to("pipe.txt")
    expected = [f"not read: 2 x file of another type, first {tmp_path}/pipe.txt"]
    assert left_out(tmp_path) == expected
    assert left_out(str(tmp_path / "*.txt")) == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "locked").mkdir(mode=0)
    assert left_out(tmp_path) == [f"not read: 1 x folder that may not be read, first {tmp_path}/locked"]


def test_a_folder_without_documents_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(
        DataError, match=r"holds no \.jsonl.*; not read: 1 x link to nothing, first .*gone\.txt"
    ):
        read(tmp_path)
