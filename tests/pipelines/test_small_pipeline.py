"""The small pipeline: every stage of the road on a tiny model, undisturbed, killed at random, and with
a layout of each stage's own.

In float32; 1e-5 relative between layouts.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from spikingbrain_train.reporting.metrics import read_metrics
from tests.pipelines.planned import steps_of
from tests.programs import Programs
from tests.small_source import END, save_small_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = ("align", "distill", "cpt_8k", "cpt_32k", "cpt_128k", "sft1", "sft2", "sft3")
ITERATIONS = 2
LEARNT = (
    "train/loss",
    "train/cross_entropy",
    "train/kl_divergence",
    "valid/",
    "alignment/",
)
"""Losses; norms of gradients are further apart."""
EXPORT = "out/export/model.safetensors"
KILLS = 5
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '" + END + "' }}{% endgeneration %}"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ARGUMENTS = (
    *("model=source", "text=[text.jsonl]", "chats=[chats.jsonl]", "output=out"),
    *(f"iterations={ITERATIONS}", "short=32", "long=48", "longest=64"),
    *("steps.text.workers=1", "steps.conversations.workers=1"),  # others would import all anew
    *("steps.text.valid_tokens=512", "steps.generate.max_new_tokens=4", "steps.generate.temperature=0"),
    *(f"steps.{stage}.settings.checkpoint.save_interval=1" for stage in STAGES),
    *(f"steps.{stage}.settings.precision=fp32" for stage in STAGES),
    # AdamW turns a gradient that is all rounding into a full step: kept out of what layouts are compared by.
    *(f"steps.{stage}.settings.optimizer.adam_eps=1e-5" for stage in STAGES),
    *("steps.evaluate_export.dtype=float32", "steps.generate.dtype=float32", "steps.spikes.dtype=float32"),
)
LAYOUTS = dict(zip(STAGES, ("tp2", "pp2", "tp2_sp", "cp2", "dp_zero1", "pp2", "cp2", "tp2"), strict=True))
"""Every two neighbours differ, so that each stage reshards what the one before has written."""
PIPELINE = ("-m", "spikingbrain_train", "pipeline", "run", "small", *ARGUMENTS)


@dataclass(frozen=True)
class Undisturbed:
    """A run from beginning to end."""

    folder: Path
    said: str
    records: dict[str, dict[str, object]]
    """What the pipeline remembers of its steps."""


def prepare(folder: Path) -> Path:
    """A model with a chat template, text and conversations."""
    source = save_small_source(folder / "source")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    documents = [json.dumps({"text": topics[name]}) for name in sorted(topics)[:8]]
    (folder / "text.jsonl").write_text("\n".join(documents))
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(40):
            asks = {"role": "user", "content": f"{number} + 1?"}
            print(
                json.dumps({"messages": [asks, {"role": "assistant", "content": f"{number + 1}"}]}), file=file
            )
    return folder


@pytest.fixture(scope="module")
def undisturbed(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = prepare(tmp_path_factory.mktemp("undisturbed"))
    run = programs.run(PIPELINE, folder)
    assert run.code == 0, run.said[-3000:]
    return Undisturbed(folder, run.said, json.loads((folder / "out/pipeline_state.json").read_text()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of every stage's last checkpoint, those of its optimizer included, and of the export.

    Not the states of random generators: no weight of these stages depends on them.
    """
    found = {f"export {name}": tensor for name, tensor in load_file(folder / EXPORT).items()}
    for stage in STAGES:
        reader = FileSystemReader(folder / f"out/{stage}/checkpoints/iter_{ITERATIONS:07d}")
        stored = {
            name: torch.empty(described.size, dtype=described.properties.dtype)
            for name, described in reader.read_metadata().state_dict_metadata.items()
            if isinstance(described, TensorStorageMetadata) and not name.startswith("generators.")
        }
        load(stored, storage_reader=reader, no_dist=True)
        found |= {f"{stage} {name}": tensor for name, tensor in stored.items()}
    return found


def test_every_step_runs(undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(undisturbed.folder)
    steps = steps_of("small", *ARGUMENTS)
    assert list(undisturbed.records) == list(steps)
    assert {
        *STAGES,
        "export",
        "evaluate_dense",
        "evaluate_export",
        "generate",
        "spikes",
        "picture",
    } < steps.keys()
    assert all(step.is_complete() for step in steps.values())
    assert all(record["exit_code"] == 0 for record in undisturbed.records.values())
    assert (undisturbed.folder / "out/loss.png").stat().st_size > 0
    assert f"all {len(steps)} steps are done" in undisturbed.said


def test_killed_at_random_five_times_it_ends_with_the_same_weights(
    undisturbed: Undisturbed, programs: Programs, tmp_path: Path
) -> None:
    folder, draw = prepare(tmp_path), random.Random(20260101)
    names = list(undisturbed.records)
    killed = []
    # Up to the export: what comes behind it makes no weights.
    for number in sorted(draw.sample(range(names.index("export") + 1), KILLS)):
        record = undisturbed.records[names[number]]
        seconds = record["seconds"]
        assert isinstance(seconds, float)
        delay = draw.uniform(0, seconds)
        run = programs.run(PIPELINE, folder, kill_at=(f"[{number + 1}/{len(names)}] ", delay))
        assert run.code == -9, run.said[-3000:]
        killed.append(f"{names[number]} after {delay:.2f} of {seconds:.2f} s")
    print("killed in", "; ".join(killed))

    run = programs.run(PIPELINE, folder)
    assert run.code == 0, run.said[-3000:]

    expected = weights(undisturbed.folder)
    found = weights(folder)
    assert found.keys() == expected.keys() and len({name.split()[0] for name in found}) == len(STAGES) + 1
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert not list((folder / "out").rglob("*.incomplete"))


def test_each_stage_in_a_layout_of_its_own_learns_what_one_rank_learns(
    undisturbed: Undisturbed, programs: Programs, tmp_path: Path
) -> None:
    folder = prepare(tmp_path)
    words = [f"steps.{stage}.nproc_per_node=2" for stage in STAGES]
    words += [f"steps.{stage}.settings.parallel={layout}" for stage, layout in LAYOUTS.items()]
    for tool, layout in (("generate", "pp2"), ("spikes", "tp2")):
        words += [f"steps.{tool}.nproc_per_node=2", f"steps.{tool}.parallel=[{layout}]"]
    run = programs.run((*PIPELINE, *words), folder)
    assert run.code == 0, run.said[-3000:]

    compared, worst = 0, 0.0
    for stage in STAGES:
        expected, found = (read_metrics(each / f"out/{stage}") for each in (undisturbed.folder, folder))
        assert len(found) == len(expected)
        for point, other in zip(expected, found, strict=True):
            for name in {name for name in point if name.startswith(LEARNT)}:
                assert other[name] == pytest.approx(point[name], rel=1e-5), f"{stage}: {name}"
                compared, worst = compared + 1, max(worst, abs(other[name] / point[name] - 1))
    print(compared, f"numbers compared, at most {worst:.1e} apart")
    assert compared > 8 * 2 * ITERATIONS

    def results(name: str, *keys: str) -> list[object]:
        found = [json.loads((each / f"out/{name}.json").read_text()) for each in (undisturbed.folder, folder)]
        for key in keys:
            found = [each[key] for each in found]
        return found

    for keys in (("evaluate_export", "cross_entropy"), ("spikes/spikes", "cross_entropy", "without_spikes")):
        one, two = results(*keys)
        assert two == pytest.approx(one, rel=1e-5), keys
    one, two = results("generate", "text")
    assert two == one
