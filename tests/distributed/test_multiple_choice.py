"""Multiple choice of checkpoints, exports and runs: the numbers of lm-eval's own command line.

Accuracies are equal; log likelihoods to 1e-4 nats, float32 in batches of other shapes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.evaluation.multiple_choice.plan import AskedTask, TaskPlan, definition_of
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_metrics
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from tests.distributed import small_runs
from tests.distributed.pool import RankPool
from tests.evaluation.multiple_choice.small_tasks import TASKS, write_tasks

PATH = "spikingbrain_train.evaluation.multiple_choice.evaluator.MultipleChoice"


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def _evaluate(*arguments: str) -> None:
    from spikingbrain_train.evaluation.command_line import evaluate

    evaluate([*arguments, "--device", "cpu", "--dtype", "float32"])


def _write_lm_eval_tasks(folder: Path, plan: TaskPlan) -> dict[str, tuple[AskedTask, str | None]]:
    """lm-eval's definitions on the questions of a plan, which ``datasets`` reads; ours by lm-eval's name."""
    names = {}
    for asked in plan.tasks:
        for subject in asked.subjects:
            name = f"local_{asked.name}_{subject}_{plan.num_fewshot}"
            names[name] = (asked, subject)
            files = {}
            for split, rows in {
                asked.task.split: plan.questions(asked, subject),
                asked.task.shots_split: plan.examples(asked, subject),
            }.items():
                if rows:
                    files[split] = str(folder / f"{name}_{split}.jsonl")
                    Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
            shots = asked.task.shots_split if plan.num_fewshot else None
            config = {
                "include": str(definition_of(asked.task, subject)),
                **{"task": name, "tag": None, "num_fewshot": plan.num_fewshot},
                **{"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}},
                **{"validation_split": None, "test_split": asked.task.split},
                "training_split": shots if shots == "train" else None,
                "fewshot_split": shots if shots == "dev" else None,
            }
            (folder / f"{name}.yaml").write_text(json.dumps(config))
    return names


def _prompts(plan: TaskPlan, asked: AskedTask, subject: str | None) -> list[str]:
    """What is put in front of every option of every question."""
    from spikingbrain_train.evaluation.multiple_choice.lm_eval_tasks import lm_eval_task

    questions, examples = plan.questions(asked, subject), plan.examples(asked, subject)
    defined = lm_eval_task(asked.task, subject, questions, examples)
    prompts = []
    for document in defined.documents:
        context = defined.task.fewshot_context(document, plan.num_fewshot)
        made = defined.task.construct_requests(doc=document, ctx=context, metadata=("", 0, 1))
        prompts += [each.args[0] for each in made]
    return prompts


@pytest.mark.slow
def test_scores_are_those_of_lm_evals_own_command_line_on_the_export(
    ranks: RankPool, text_checkpoint: Path, task_data: Path, tmp_path: Path
) -> None:
    export, definitions = tmp_path / "export", tmp_path / "definitions"
    export_checkpoint(text_checkpoint, export)
    definitions.mkdir()
    plan = TaskPlan.of(TASKS, task_data)
    with_examples = TaskPlan.of("mmlu,arc_challenge", task_data, num_fewshot=1)
    names = _write_lm_eval_tasks(definitions, plan)
    names_with_examples = _write_lm_eval_tasks(definitions, with_examples)
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"),
            *("--model_args", f"pretrained={export},trust_remote_code=True,dtype=float32"),
            *("--tasks", ",".join({**names, **names_with_examples}), "--include_path", str(definitions)),
            *("--output_path", str(tmp_path / "theirs"), "--log_samples", "--batch_size", "1"),
        ],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]

    words = ["--model", str(text_checkpoint), "--tasks", TASKS, "--task-data", str(task_data)]
    ours_file = tmp_path / "ours.json"
    picture = tmp_path / "ours.png"
    words += ["--plot", str(picture)]
    ranks.run(_evaluate, *words, "--parallel", "tp2", "--output", str(ours_file), world_size=2)
    assert picture.read_bytes().startswith(b"\x89PNG")
    ours = json.loads(ours_file.read_text())["tasks"]
    for name, (asked, subject) in names.items():
        mine = ours[asked.name]["subjects"][subject] if subject else ours[asked.name]
        assert mine["accuracy"] == theirs[name]["acc,none"], name
        assert mine["stderr"] == pytest.approx(theirs[name]["acc_stderr,none"]), name
        assert mine.get("acc_norm") == theirs[name].get("acc_norm,none"), name

    # The same prompts, and of every option the same token ids and likelihood by the export in our hands.
    asked_pairs, expected = [], []
    for name, (asked, subject) in {**names, **names_with_examples}.items():
        (file,) = (tmp_path / "theirs").rglob(f"samples_{name}_2*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        pairs = [list(each.values()) for sample in samples for each in sample["arguments"].values()]
        of_plan = plan if name in names else with_examples
        assert [prompt for prompt, _ in pairs] == _prompts(of_plan, asked, subject), name
        asked_pairs += pairs
        expected += [float(each[0][0]) for sample in samples for each in sample["resps"]]
    assert len(expected) == 134
    assert _likelihoods(export, asked_pairs) == pytest.approx(expected, abs=1e-4)


def _likelihoods(export: Path, pairs: list[list[str]]) -> list[float]:
    import torch

    from spikingbrain_train.evaluation.huggingface_language_model import HuggingFaceLanguageModel
    from spikingbrain_train.evaluation.multiple_choice.lm_eval_encoder import LmEvalEncoder
    from spikingbrain_train.evaluation.pretrained import load_causal_lm
    from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer

    loaded = load_causal_lm(export, trust_remote_code=True, dtype=torch.float32, device=torch.device("cpu"))
    model = HuggingFaceLanguageModel(loaded, TextTokenizer(export))
    encoder = LmEvalEncoder(model.tokenizer, model.max_length)
    requests = encoder.requests([SimpleNamespace(args=tuple(pair)) for pair in pairs])
    return [score.log_prob for score in model.score(requests)]


def _train(groups: ProcessGroups, config: Any) -> tuple[list[tuple[float, float]], str]:
    """Losses and gradient norms, and a digest of the weights."""
    from spikingbrain_train.training.trainer import Trainer

    remember = small_runs.Remember()
    trainer = Trainer(config, groups, [remember])
    trainer.train()
    weights = b"".join(p.detach().numpy().tobytes() for p in trainer.state.model.parameters())
    return remember.steps, hashlib.sha256(weights).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [2, 1], ids=["TP 2", "DP 2"])
def test_a_run_asks_its_model_and_trains_as_without(
    tensor_parallel: int,
    ranks: RankPool,
    text: Path,
    text_checkpoint: Path,
    task_data: Path,
    tmp_path: Path,
) -> None:
    checkpoint = resolve_checkpoint(text_checkpoint, "--model")
    settings = {"tasks": "mmlu,piqa", "task_data": str(task_data), "permutations": True}
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel)
    found = {}
    for name in ("with", "without"):
        config = small_runs.run_config(
            tmp_path / name,
            text,
            model=read_stored_model(checkpoint),
            checkpoint=small_runs.checkpoint_config(text_checkpoint),
            parallel=parallel,
        )
        config.stage, config.optimizer.lr_warmup_iters = replace(config.stage, train_iters=2), 0
        if name == "with":
            config.logging.eval_interval = 1
            config.logging.evaluators = [{"path": PATH, "settings": settings}]
        found[name] = ranks.run(_train, config, world_size=2, parallel=parallel)
    assert found["with"] == found["without"]
    points = [point for point in read_metrics(tmp_path / "with") if "tasks/mmlu/accuracy" in point]
    assert len(points) == 3 and points[0]["tasks/mmlu/accuracy"] != 0
    reported = {name for name in points[0] if name.startswith("tasks/")}
    page = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    assert all(
        f"`{name.replace('/mmlu/', '/<task>/').replace('/piqa/', '/<task>/')}`" in page for name in reported
    )
    assert reported == {
        *("tasks/mmlu/accuracy", "tasks/mmlu/right_under_all_orders", "tasks/mmlu/same_option_in_all_orders"),
        *("tasks/piqa/accuracy", "tasks/piqa/acc_norm"),
    }

    words = ["--model", str(text_checkpoint), "--tasks", "mmlu,piqa", "--task-data", str(task_data)]
    ranks.run(_evaluate, *words, "--output", str(tmp_path / "command.json"), world_size=1)
    command = json.loads((tmp_path / "command.json").read_text())["tasks"]
    for name in ("mmlu", "piqa"):
        assert points[0][f"tasks/{name}/accuracy"] == command[name]["accuracy"]
