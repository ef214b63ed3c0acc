"""A conversion that was killed goes on, in any number of processes, to the bytes of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingConfig
from spikingbrain_train.config.model import MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion import export_parts, import_parts, part_workers, parts, reshard_parts
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.output_folder import StoppedEarly
from spikingbrain_train.conversion.reshard import reshard_checkpoint
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage import file_blocks
from tests.programs import Programs

if TYPE_CHECKING:  # else the processes that are killed would import transformers first
    from tests.conversion.hf_models import HFCheckpoint

HYBRID = ConversionConfig(mixers=["gla", "swa"], sliding_window=5)
MODULES = (import_parts, export_parts, reshard_parts)
PARTS: dict[str, type[parts.Parts]] = {
    "import": import_parts.ImportParts,
    "export": export_parts.ExportParts,
    "reshard": reshard_parts.ReshardParts,
}
SMALL = {"num_hidden_layers": 2, "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48}

# Converts with small parts, each of which takes its time: the command of a test that kills it.
SLOWLY = """
import sys, time
from pathlib import Path
from tests.conversion.test_resumed_conversion import MODULES, PARTS, convert
which, source, output, seconds = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
parts = PARTS[which]
for module in MODULES:
    module.PART_BYTES = 4000
def slow(self, number, folder, advance, write=parts.write):
    print("part", number, flush=True)
    time.sleep(seconds)
    return write(self, number, folder, advance)
parts.write = slow
convert(which, source, output)
print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of a model of this size."""
    for module in MODULES:
        monkeypatch.setattr(module, "PART_BYTES", 4000)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def written_parts(
    monkeypatch: pytest.MonkeyPatch, of: type[parts.Parts], fails_at: int | None = None
) -> list[int]:
    """The parts that are written from now on; the one after ``fails_at`` is interrupted."""
    numbers: list[int] = []
    write = of.write

    def noted(self: parts.Parts, number: int, folder: Path, advance: parts.Advance) -> parts.Record:
        if fails_at is not None and len(numbers) > fails_at:
            raise KeyboardInterrupt
        numbers.append(number)
        return write(self, number, folder, advance)

    monkeypatch.setattr(of, "write", noted)
    return numbers


def convert(which: str, source: Path, output: Path) -> None:
    if which == "import":
        import_checkpoint(source, output, HYBRID, overwrite=True)
    elif which == "reshard":
        reshard_checkpoint(source, output, ParallelConfig(pipeline_model_parallel_size=2), overwrite=True)
    else:
        export_checkpoint(source, output, max_shard_size=20000, overwrite=True)


@pytest.fixture
def sources(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> dict[str, Path]:
    """What each way starts from."""
    source, _ = hf_checkpoint("qwen2", **SMALL, max_shard_size="10KB")
    import_checkpoint(source, tmp_path / "megatron", HYBRID)
    return {"import": source, "export": tmp_path / "megatron", "reshard": tmp_path / "megatron"}


@pytest.mark.parametrize("which", PARTS)
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    which: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out/result"
    convert(which, sources[which], output)
    undisturbed = content(output)
    shutil.rmtree(output.parent)
    with monkeypatch.context() as patch:
        first = written_parts(patch, PARTS[which], fails_at=3)
        with pytest.raises(KeyboardInterrupt):
            convert(which, sources[which], output)
    (left,) = output.parent.iterdir()
    assert left.name.startswith("result.tmp-") and not output.exists()
    with monkeypatch.context() as patch:
        second = written_parts(patch, PARTS[which])
        convert(which, sources[which], output)
    assert len(first) == 4 and not set(first) & set(second) and second
    assert content(output) == undisturbed
    assert [path.name for path in output.parent.iterdir()] == ["result"]


def test_a_part_that_is_not_what_it_was_is_written_again(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out/result"
    convert("import", sources["import"], output)
    undisturbed = content(output)
    shutil.rmtree(output.parent)
    with monkeypatch.context() as patch:
        written_parts(patch, import_parts.ImportParts, fails_at=3)
        with pytest.raises(KeyboardInterrupt):
            convert("import", sources["import"], output)
    (data,) = output.parent.rglob("__0_1.distcp")
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.write_bytes(damaged)
    next(output.parent.rglob("__0_2.distcp")).unlink()
    with monkeypatch.context() as patch:
        again = written_parts(patch, import_parts.ImportParts)
        convert("import", sources["import"], output)
    assert {1, 2} < set(again) and 0 not in again
    assert content(output) == undisturbed


def test_another_source_or_recipe_begins_anew(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out/result"

    def leave_and_go_on(change: Callable[[], ConversionConfig]) -> int:
        with monkeypatch.context() as patch:
            written_parts(patch, import_parts.ImportParts, fails_at=3)
            with pytest.raises(KeyboardInterrupt):
                convert("import", sources["import"], output)
        recipe = change()
        with monkeypatch.context() as patch:
            again = written_parts(patch, import_parts.ImportParts)
            import_checkpoint(sources["import"], output, recipe)
        assert [path.name for path in output.parent.iterdir()] == ["result"]
        shutil.rmtree(output)
        return min(again)

    def touch() -> ConversionConfig:
        os.utime(next(sources["import"].glob("*.safetensors")))
        return HYBRID

    assert leave_and_go_on(lambda: HYBRID) == 4
    assert leave_and_go_on(touch) == 0
    assert leave_and_go_on(lambda: ConversionConfig(mixers=["gla"])) == 0


@pytest.mark.parametrize("overwrites", [False, True])
def test_a_call_killed_behind_the_last_step_is_complete(
    sources: dict[str, Path], tmp_path: Path, overwrites: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out/result"
    if overwrites:
        convert("import", sources["import"], output)
    monkeypatch.setattr("spikingbrain_train.storage.temporary_folder.shutil.rmtree", lambda *_, **__: None)
    import_checkpoint(sources["import"], output, HYBRID, overwrite=overwrites)
    monkeypatch.undo()
    monkeypatch.setattr(import_parts, "PART_BYTES", 4000)
    assert len(list(output.parent.iterdir())) == 2
    undisturbed = content(output)
    again = written_parts(monkeypatch, import_parts.ImportParts)
    report = import_checkpoint(sources["import"], output, HYBRID)
    assert "a killed call had written all of it; nothing was left to do" in report.notes
    assert not again and content(output) == undisturbed
    assert [path.name for path in output.parent.iterdir()] == ["result"]


@pytest.mark.slow
@pytest.mark.parametrize("which", PARTS)
def test_a_killed_process_is_gone_on_from(
    which: str, sources: dict[str, Path], programs: Programs, tmp_path: Path
) -> None:
    output = tmp_path / "out/result"
    convert(which, sources[which], output)
    undisturbed = content(output)
    shutil.rmtree(output.parent)
    slowly = tmp_path / "slowly.py"
    slowly.write_text(SLOWLY)
    command = [str(slowly), which, str(sources[which]), str(output)]
    killed = programs.run([*command, "0.5"], tmp_path, kill_at=("part 3\n", 0))
    assert killed.code == -signal.SIGKILL, killed.said
    done = programs.run([*command, "0"], tmp_path)
    assert done.code == 0, done.said
    assert "part 4\n" in done.output and "part 1\n" not in done.output
    assert content(output) == undisturbed
    assert [path.name for path in output.parent.iterdir()] == ["result"]


@pytest.mark.slow
def test_the_number_of_processes_does_not_show(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint("qwen2", **SMALL)
    recipe = ConversionConfig(
        mixers=[["gla", "swa"]],
        feed_forwards=["moe"],
        moe=MoEConfig(num_experts=4),
        upcycling=UpcyclingConfig(reinit_fraction=0.5),
    )
    for workers in (1, 2):
        import_checkpoint(source, tmp_path / str(workers) / "out", recipe, workers=workers)
    one, two = content(tmp_path / "1/out"), content(tmp_path / "2/out")
    del one["conversion_report.json"], two["conversion_report.json"]  # it names the folder
    assert one == two and len([name for name in one if name.endswith(".distcp")]) > 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_a_worker_that_is_killed_is_said_and_gone_on_from(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    output = tmp_path / "out/result"
    run = part_workers._Processes.run
    processes: list[BaseProcess] = []

    def killing(
        self: part_workers._Processes, *arguments: object
    ) -> Iterator[tuple[int, parts.Record | None]]:
        for result in run(self, *arguments):  # type: ignore[arg-type]
            yield result
            processes[:] = list(self.executor._processes.values())
            processes[0].kill()
            time.sleep(0.2)

    with monkeypatch.context() as patch:
        patch.setattr(part_workers._Processes, "run", killing)
        with pytest.raises(
            StoppedEarly, match="was killed, probably for want of memory; run the same command"
        ):
            import_checkpoint(sources["import"], output, HYBRID, workers=workers)
    assert len(processes) == workers - 1 and not any(process.is_alive() for process in processes)
    assert list(output.parent.iterdir()) and not output.exists()
    import_checkpoint(sources["import"], output, HYBRID)
    assert [path.name for path in output.parent.iterdir()] == ["result"]


def test_a_tensor_that_comes_back_changed_is_refused(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the memory or of a layout, after which an import would be another model."""
    read = file_blocks.read_exactly

    def flipped(file: file_blocks.FileIO, view: memoryview) -> None:
        read(file, view)
        view[-1] ^= 1

    monkeypatch.setattr(file_blocks, "read_exactly", flipped)
    with pytest.raises(CheckpointError, match="was written, but other bytes are read back"):
        import_checkpoint(sources["import"], tmp_path / "out/result")
    assert not list((tmp_path / "out").iterdir())
