"""What benchmarks/gpu.py plans, keeps and reports; what it measures needs a GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_fp8, gpu_ops, gpu_pieces
from benchmarks.gpu_ops import feed_forward_product
from benchmarks.gpu_pieces import PIECES, Keep, Loan, Results, Row, TrainingSteps, run_piece, stated_memory
from benchmarks.gpu_report import report
from benchmarks.project_commands import OutOfTimeError
from benchmarks.training_contenders import OURS
from spikingbrain_train.config.fp8 import Fp8Config, Fp8Format, Fp8Recipe
from spikingbrain_train.errors import ConfigurationError, PlatformError
from spikingbrain_train.parallel.process_groups import destroy
from spikingbrain_train.planning.fit import DeviceMemory
from spikingbrain_train.planning.planner import plan_run

MACHINE = {"device": "NVIDIA H200", "torch": "2.11"}
LATER = time.monotonic() + 3600


class Cut:
    """A piece of two cells, whose second one is cut off when so many rows of it are there."""

    name = "cut"

    def __init__(self, rows: int) -> None:
        self.cells = ["first", "second"]
        self.measured: list[str] = []
        self.rows = rows

    def describe(self, memory: DeviceMemory | None) -> Iterator[str]:
        yield ""

    def measure(self, cell: str, loan: Loan, keep: Keep) -> None:
        self.measured.append(cell)
        for number in range(3):
            if cell == "second" and number == self.rows:
                raise OutOfTimeError
            keep({"times": list(range(number + 1))})


def test_every_piece_composes_and_fits_into_an_h200() -> None:
    memory = stated_memory(None)
    for name, piece in PIECES.items():
        lines = list(piece.describe(memory))
        assert piece.cells and lines, name
        if isinstance(piece, TrainingSteps):
            assert "GiB of 140.4: fits" in lines[0], name


def test_the_plan_is_that_of_the_steps_that_are_taken() -> None:
    piece = PIECES["step-7b-128k"]
    assert isinstance(piece, TrainingSteps)
    assert piece.plan.fullest.memory == plan_run(piece.config, 1).fullest.memory


def test_what_is_measured_stays_and_the_next_call_goes_on(tmp_path: Path) -> None:
    loan = Loan(tmp_path, LATER)
    assert not run_piece(Cut(rows=2), loan, MACHINE)
    assert Results.read(tmp_path, "cut").cells["second"] == {"times": [0, 1]}
    shorter = Cut(rows=1)
    assert not run_piece(shorter, loan, MACHINE)
    assert shorter.measured == ["second"]
    assert Results.read(tmp_path, "cut").cells["second"] == {"times": [0, 1]}, "a shorter try replaced it"
    whole = Cut(rows=9)
    assert run_piece(whole, loan, MACHINE)
    assert Results.read(tmp_path, "cut").cells["second"] == {"times": [0, 1, 2], "complete": True}
    done = Cut(rows=0)
    assert run_piece(done, loan, MACHINE) and not done.measured


def test_results_of_two_machines_do_not_mix(tmp_path: Path) -> None:
    run_piece(Cut(rows=0), Loan(tmp_path, LATER), MACHINE)
    with pytest.raises(ConfigurationError, match="another machine .* choose another --output"):
        run_piece(Cut(rows=0), Loan(tmp_path, LATER), {**MACHINE, "torch": "2.12"})
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(
        ConfigurationError, match="cut.json is not what this benchmark has written; remove it"
    ):
        Results.read(tmp_path, "cut")


def test_steps_are_measured_beside_the_estimate_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TrainingSteps("step-tiny", "tiny_hybrid", 64)
    monkeypatch.setattr(gpu_pieces, "STEPS", 2)
    monkeypatch.setitem(PIECES, "step-tiny", tiny)
    assert not run_piece(tiny, Loan(tmp_path, time.monotonic(), device="cpu"), MACHINE), "no time is left"
    assert run_piece(tiny, Loan(tmp_path, LATER, device="cpu"), MACHINE)
    row = Results.read(tmp_path, "step-tiny").cells[OURS]
    assert len(row["seconds"]) == 2 and row["peak_gib"] > row["planned_gib"] > 0
    text = report(tmp_path)
    assert f"| tiny_hybrid | {tiny.config.model.num_layers} | 64 | none | {OURS} |" in text
    assert f"{row['peak_gib']:.2f} GiB | {row['planned_gib']:.2f} GiB |" in text
    assert "device NVIDIA H200, torch 2.11" in text and "step-7b-8k (" in text and "step-tiny (" not in text


def test_a_report_has_tables_of_what_is_measured_alone(tmp_path: Path) -> None:
    assert "|" not in report(tmp_path)
    cells: dict[str, Row] = {
        "window": {
            "times": [{"op": "w", "tokens": 8, "contender": "ours", "ms": 1.0, "against_ours": 1.0}],
        },
        "losses": {"losses": {"align": {"cpu": [1.0, 2.0], "cuda": [1.001, 2.02]}}},
        "errors": {"errors": [{"kernel": "fla", "case": "documents", "error": "2.9e-03"}]},
        "no room": {
            **dict.fromkeys(("model", "layers", "tokens", "recompute", "contender"), "x"),
            "planned_gib": 150.0,
            "failed": "out of memory (x)",
        },
    }
    Results(tmp_path / "demo.json", cells, MACHINE).write()
    text = report(tmp_path)
    assert "| w | 8 | ours | 1.00 ms | 1.00 x |" in text
    assert "| align | 2 | 2.0e-02 | ABOVE 0.01 |" in text
    assert "| fla | documents | 2.9e-03 |" in text
    assert "| out of memory (x) |" in text and "| 150.0 GiB |" in text


def forget_layers() -> None:
    """And the groups that they were built in."""
    gpu_ops.built_layer.cache_clear()
    gpu_ops._groups.cache_clear()
    destroy()


def test_the_product_of_a_feed_forward_is_that_of_torch() -> None:
    try:
        contenders = feed_forward_product(16, "tiny_hybrid", "cpu")
        outputs = []
        for function, inputs in contenders.values():
            leaves = [x.detach().requires_grad_() for x in inputs]
            o = function(*leaves)
            outputs.append([o, *torch.autograd.grad(o, leaves, torch.ones_like(o))])
    finally:
        forget_layers()
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_linears_in_fp8_are_timed_on_the_same_numbers_as_in_bf16() -> None:
    try:
        contenders = gpu_fp8.products(16, "down", "tiny_hybrid", "cpu")
        outputs = {}
        for name, (function, inputs) in contenders.items():
            leaves = [x.detach().requires_grad_() for x in inputs]
            o = function(*leaves)
            outputs[name] = [o, *torch.autograd.grad(o, leaves, torch.ones_like(o))]
    finally:
        forget_layers()
    assert list(outputs) == [gpu_ops.OURS, "bf16", "cuBLAS, F.linear"]
    for fp8, plain, theirs in zip(*outputs.values(), strict=True):
        torch.testing.assert_close(plain, theirs)
        error = (fp8.float() - theirs.float()).norm() / theirs.float().norm()
        assert 1e-3 < error < 0.1, "no FP8 product"


def test_steps_in_fp8_are_those_of_their_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = PIECES["step-7b-8k-fp8-blockwise"]
    assert isinstance(piece, TrainingSteps)
    assert (
        piece.setting.run_config.fp8 == piece.config.fp8 == Fp8Config(Fp8Format.hybrid, Fp8Recipe.blockwise)
    )
    tiny = TrainingSteps("step-tiny", "tiny_hybrid", 64, fp8=Fp8Recipe.tensorwise)
    monkeypatch.setattr(gpu_pieces, "STEPS", 1)
    monkeypatch.setitem(PIECES, "step-tiny", tiny)
    assert run_piece(tiny, Loan(tmp_path, LATER, device="cpu"), MACHINE)
    assert "| tiny_hybrid in FP8, tensorwise |" in report(tmp_path)


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A800")
    with pytest.raises(PlatformError, match="NVIDIA A800 has no FP8 products"):
        gpu_fp8.recipes("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert gpu_fp8.recipes("cuda") == [Fp8Recipe.tensorwise, Fp8Recipe.blockwise]


def test_without_a_gpu_one_sentence_names_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--dry-run shows what would be measured" in said and said.count("\n") == 1
