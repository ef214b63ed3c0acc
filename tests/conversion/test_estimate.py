"""What a conversion is expected to take, before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikingbrain_train.conversion import estimate as module
from spikingbrain_train.conversion.estimate import choose_workers, estimate, process_bytes
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.output_folder import Leftover
from spikingbrain_train.conversion.parts import Advance, Parts, Record
from spikingbrain_train.errors import ConfigurationError
from tests.conversion.hf_models import HFCheckpoint

GB = 10**9


class Some(Parts):
    """Parts of which nothing is written."""

    def __init__(self, sizes: list[int], largest_piece: int = 8 << 20) -> None:
        self.sizes, self.largest_piece = sizes, largest_piece

    def write(self, number: int, folder: Path, advance: Advance) -> Record:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, 16 GB; a disk of 1 GB/s, and checksums at 8 GB/s a core."""
    monkeypatch.setattr(module, "available_cores", lambda: 4)
    monkeypatch.setattr(module, "memory_limit", lambda: 16 * GB)
    monkeypatch.setattr(module, "_write_speed", lambda *_: 1.0 * GB)
    monkeypatch.setattr(module, "_checksum_speed", lambda: 8.0 * GB)


def test_the_slower_of_disk_and_cores_decides(tmp_path: Path) -> None:
    parts = Some([GB] * 10)
    one, four = (estimate(parts, 10 * GB, workers, tmp_path / "out", Leftover()) for workers in (1, 4))
    assert four.seconds == pytest.approx(module._START_SECONDS + 20)  # the disk is waited for
    slow = estimate(Some([GB] * 10), 0, 1, tmp_path / "out", Leftover())
    assert one.seconds == slow.seconds == pytest.approx(module._PASSES * 10 / 8)  # the core is
    assert (one.written, one.read, one.parts) == (10 * GB, 10 * GB, 10)


def test_what_a_killed_call_left_is_not_written_again(tmp_path: Path) -> None:
    parts = Some([GB] * 10)
    whole, rest = (
        estimate(parts, 10 * GB, 4, tmp_path / "out", Leftover(bytes=done)) for done in (0, 9 * GB)
    )
    assert whole.seconds - rest.seconds == pytest.approx(18)
    assert "of which a killed call has left 9.00 GB" in "\n".join(rest.lines())


def test_workers_follow_cores_memory_and_work() -> None:
    assert choose_workers(None, Some([GB] * 100)) == 4
    assert choose_workers(None, Some([GB] * 3)) == 1  # not worth a process
    assert choose_workers(None, Some([GB] * 100, largest_piece=2 * GB)) == 1
    assert process_bytes(Some([GB], largest_piece=2 * GB)) > 6 * GB
    assert choose_workers(3, Some([GB] * 2)) == 2
    with pytest.raises(ConfigurationError, match="--workers is 0: give at least 1"):
        choose_workers(0, Some([GB]))
    with pytest.raises(ConfigurationError, match="--workers is 99: on 4 cores give at most 16"):
        choose_workers(99, Some([GB]))


def test_a_dry_run_says_what_it_will_take_and_writes_nothing(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2)
    import_checkpoint(source, tmp_path / "megatron")
    before = sorted(tmp_path.rglob("*"))
    for report in (
        import_checkpoint(source, tmp_path / "out", dry_run=True),
        export_checkpoint(tmp_path / "megatron", tmp_path / "out", dry_run=True),
    ):
        plan, disk, memory, time = report.needs
        assert plan.startswith("plan: 1 parts of about 512 MB, 1 process; a kill costs at most")
        assert disk.startswith("disk: reads 0.00 GB, writes 0.00 GB; ") and disk.endswith(" GB are free")
        assert (
            memory.startswith("memory: about 0.")
            and time == "time: about 1s from its first byte on, as fast as disk and cores are now"
        )
        assert all(line in report.table() for line in report.needs)
    assert sorted(tmp_path.rglob("*")) == before
