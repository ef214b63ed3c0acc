"""The demo from end to end, as `make demo` runs it, on a model and stages of a size for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikingbrain_train.data.gpt_dataset import open_valid_dataset
from spikingbrain_train.reporting.plots.dense_line import DenseLine
from spikingbrain_train.reporting.plots.recording import Recording
from tests.programs import Programs
from tests.small_source import save_small_source

ROOT = Path(__file__).parents[3]
STAGE = ["stage.seq_length=64", "optimizer.lr_warmup_iters=0", "logging.log_interval=1"]
ALIGN = [*STAGE, "stage.train_iters=3"]
CPT = [*STAGE, "stage.train_iters=2", "logging.tensorboard=false"]


def demo(programs: Programs, folder: Path, *, cpt: list[str] = CPT, extra: tuple[str, ...] = ()) -> str:
    """Run the demo in ``folder`` and return what it printed."""
    command = [str(ROOT / "tools" / "demo.py"), "--output", "the output"]
    command += ["--model", "source", "--data", "text.jsonl", "--prompt", "The for", *extra]
    command += ["--align-args", *ALIGN, "--cpt-args", *cpt]
    done = programs.run(command, folder)
    assert done.code == 0, done.said[-4000:]
    return done.output


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    save_small_source(folder / "source")
    documents = [{"text": f"The for statement number {n} iterates. " * 12} for n in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


@pytest.fixture(scope="module")
def first_run(programs: Programs, workplace: Path) -> str:
    return demo(programs, workplace)


def rows(workplace: Path) -> dict[str, dict[str, float | None]]:
    report = json.loads((workplace / "the output" / "demo_report.json").read_text())
    return {row.pop("label"): row for row in report["rows"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_table_holds_what_was_measured(workplace: Path, first_run: str) -> None:
    table = rows(workplace)
    assert table["dense source"]["tokens_seen"] == table["right after the swap"]["tokens_seen"] == 0
    assert table["after the align stage"]["tokens_seen"] == 3 * 64
    assert table["after the cpt stage"]["tokens_seen"] == (3 + 2) * 64
    measured = {label: row["cross_entropy"] for label, row in table.items() if row["cross_entropy"]}
    assert list(measured) == [
        "dense source",
        "right after the swap",
        "after the align stage",
        "after the cpt stage",
        "export, read back by transformers",
    ]
    # The export computes in float32 what training computed in bf16: three digits of the logits differ.
    assert measured["export, read back by transformers"] == pytest.approx(
        measured["after the cpt stage"], abs=0.02
    )
    for label, value in measured.items():
        assert value is not None
        assert any(label in line and f"{value:.3f}" in line for line in first_run.splitlines()), label
    assert "; layers were chosen on 2,048 others, of the training text" in first_run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dense_row_equals_a_direct_computation(workplace: Path, first_run: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(workplace / "source").float().eval()
    dataset = open_valid_dataset([str(workplace / "the output" / "data" / "text_valid")], 64, 16)
    total, tokens = 0.0, 0
    for index in range(len(dataset)):
        sample = dataset[index]
        with torch.no_grad():
            logits = model(sample["tokens"][None]).logits[0]
        kept = sample["loss_mask"] > 0
        total += float(
            torch.nn.functional.cross_entropy(logits[kept], sample["labels"][kept], reduction="sum")
        )
        tokens += int(kept.sum())
    assert rows(workplace)["dense source"]["cross_entropy"] == pytest.approx(total / tokens, rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_export_loads_with_transformers_and_report_lies_beside_it(workplace: Path, first_run: str) -> None:
    output = workplace / "the output"
    model = AutoModelForCausalLM.from_pretrained(output / "export", trust_remote_code=True)
    assert model.config.model_type == "gla_swa"
    ids = AutoTokenizer.from_pretrained(output / "export")("The for", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids["input_ids"].shape[1] + 3
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    dense = DenseLine.read(str(output / "evaluate_dense.json"))
    stages = [Recording.read(output / stage) for stage in ("align", "cpt")]
    assert [stage.held_out for stage in stages] == [{dense.held_out}] * 2, "of other windows"
    assert dense.reason_against(stages) is None
    report = (output / "demo_report.md").read_text()
    assert "![loss curves](loss.png)" in report and "> The for" in report
    assert "train experiment=smollm2_align" in report
    assert not list(output.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_second_run_does_no_work_and_a_changed_stage_only_what_follows(
    programs: Programs, workplace: Path, first_run: str
) -> None:
    output = workplace / "the output"
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/**/*") if path.is_file()}
    again = demo(programs, workplace)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.count(": done (") == 11 and "spikingbrain_train" not in again
    assert again.splitlines()[-12:] == first_run.splitlines()[-12:]

    changed = demo(programs, workplace, cpt=[*CPT, "optimizer.lr=1e-3"])
    assert changed.count(": done (") == 6
    assert "train experiment=smollm2_cpt" in changed and "smollm2_align" not in changed
