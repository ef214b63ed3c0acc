"""What needs no torch imports none: help, printed configs, plans, completion, refusals of arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain_train.commands.table import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SLOW = (
    "torch",
    "transformers",
    "megatron",
    "matplotlib",
    "scipy",
    "pandas",
    "tensorboard",
    "wandb",
    "triton",
    "lm_eval",
    "datasets",
)
"""Packages that take a second or more to import."""

RUN_ALL = f"""
import contextlib, io, json, sys
from spikingbrain_train.commands.main import main

for line in sys.stdin:
    sys.argv = ["__main__.py", *json.loads(line)]
    said, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            main()
    except SystemExit as end:
        code = end.code
    slow = [name for name in {SLOW} if name in sys.modules]
    print(json.dumps([code or 0, slow, said.getvalue()]), flush=True)
"""
TINY = (
    "model=tiny_hybrid",
    "cluster=cpu",
    "stage.seq_length=64",
    "stage.global_batch_size=1",
    "stage.train_iters=1",
)

# (command line, exit code)
LINES: list[tuple[tuple[str, ...], int]] = [
    ((), 0),
    *(((command.name, "--help"), 0) for command in COMMANDS),
    *(
        (("convert", word, "--help"), 0)
        for word in ("import", "export", "inspect", "reshard", "diff", "average")
    ),
    *((("pipeline", word, "--help"), 0) for word in ("run", "dry-run", "status")),
    (("train", "--cfg", "job", *TINY), 0),
    (("train", "--cfg", "job", "--resolve", *TINY, "output_dir=x"), 0),
    (("train", "--cfg", "job", "experiment=spikingbrain_7b_8k"), 0),
    (("train", "--info", "defaults-tree", *TINY), 0),
    (("plan", *TINY), 0),
    (("plan", "experiment=spikingbrain_76b_128k", "cluster=metax"), 0),
    (("plan", "--multirun", *TINY, "seed=1,2", "data.train=[nowhere]", "output_dir=x"), 2),
    (
        (
            "plan-parallel",
            "--gpus",
            "2",
            "--cluster",
            "h100",
            *TINY[:1],
            *TINY[2:3],
            "stage.global_batch_size=4",
        ),
        0,
    ),
    (("completion", "bash"), 0),
    (("completion", "suggest", "--line=spikingbrain-train model="), 0),
    (("completion", "suggest", "--line=spikingbrain-train opt"), 0),
    *((("completion", "suggest", f"--line={command.program} -"), 0) for command in COMMANDS),
    (("pipeline", "dry-run", "spikingbrain_7b"), 0),
    (("train", "model=nothing"), 2),
    (("train", "optimizer.lr=fast"), 2),
    (("train", *TINY, "data.train=[nowhere]", "output_dir=x"), 2),
    (("train", "--nproc-per-node", "0", *TINY), 2),
    (("train", "--nproc-per-node", "2", *TINY, "parallel=tp2_pp2"), 2),
    (("train", "checkpoint.load=nowhere", "output_dir=x"), 2),
    (("evaluate", "--model", "nowhere", "--data", "nowhere"), 2),
    (("evaluate", "--model", "nowhere", "--tasks", "piqa", "--task-data", "nowhere"), 2),
    (("generate", "--model", "nowhere", "--prompt", "x"), 2),
    (("convert", "import", "--hf", "nowhere", "--output", "x"), 2),
    (("convert", "inspect", "nowhere"), 2),
    (("export", "--checkpoint", "nowhere", "--output", "x"), 2),
    (("cache-teacher", "--output", "x", *TINY, "stage=distill", "stage.teacher=nowhere"), 2),
    (("profile-step", "--output", "x", *TINY, "data.train=[nowhere]"), 2),
    (("profile-step", "--output", "x", "--ranks", "1", *TINY), 2),
    (("profile-step", "--output", "x", "--steps", "0", *TINY), 2),
    (("preprocess", "--input", "nowhere", "--tokenizer", "nowhere", "--output-prefix", "x"), 2),
    (("plot", "nowhere"), 2),
    (("demo", "--output", "x", "--model", "nowhere"), 2),
    (("preproces",), 2),
]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, list[str], str]]:
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input="\n".join(json.dumps(line) for line, _ in LINES),
        cwd=tmp_path_factory.mktemp("anywhere"),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(LINES)), ids=[" ".join(line) or "(none)" for line, _ in LINES])
def test_nothing_slow_is_imported(endings: list[tuple[int, list[str], str]], number: int) -> None:
    code, slow, said = endings[number]
    assert code == LINES[number][1], said
    assert slow == []


def test_a_dry_run_of_an_import_leaves_checkpoint_files_alone(tmp_path: Path) -> None:
    """torch.distributed.checkpoint, a second and more, is imported by what reads or writes checkpoints."""
    from tests.small_source import save_small_source

    words = ["import", "--dry-run", "--hf", str(save_small_source(tmp_path / "source")), "--output", "x"]
    program = f"""
import json, sys
from spikingbrain_train.commands.main import main

sys.argv = ["__main__.py", "convert", *{words!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = ("torch.distributed.checkpoint", "torch.distributed.tensor", "megatron", "transformers")
print(json.dumps([name for name in ("torch", *heavy) if name in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["torch"]
