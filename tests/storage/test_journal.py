"""What is done is written down so that another call can go on, also where a line was cut off."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.storage.journal import Journal, key_of


def test_results_are_there_for_work_with_the_same_key_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "this").add("part 0", {"bytes": 3})
    assert key_of(path) == "this"
    again = Journal(path, "this")
    again.add("part 1", [1])
    assert Journal(path, "this").entries == {"part 0": {"bytes": 3}, "part 1": [1]}
    assert Journal(path, "other").entries == {}
    assert key_of(path) == "other"


def test_a_line_that_was_cut_off_is_forgotten_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "this")
    journal.add("part 0", 0)
    whole = path.stat().st_size
    journal.add("part 1", "of the second part")
    content = path.read_bytes()
    for size in range(whole, len(content)):
        path.write_bytes(content[:size])
        again = Journal(path, "this")
        assert again.entries == {"part 0": 0}
        again.add("part 2", 2)
        assert Journal(path, "this").entries == {"part 0": 0, "part 2": 2}


def test_no_journal_has_no_key(tmp_path: Path) -> None:
    assert key_of(tmp_path / "absent") is None
    for content in (b"", b"{", b"[]\n", b'{"version":99,"key":"this"}\n', b'{"version":1,"key":"this"}'):
        (tmp_path / "journal.jsonl").write_bytes(content)
        assert key_of(tmp_path / "journal.jsonl") is None
