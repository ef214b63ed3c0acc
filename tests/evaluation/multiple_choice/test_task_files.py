"""What is wrong with files, tasks and numbers is one sentence, before torch and lm-eval are imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.errors import ConfigurationError, DataError, PlatformError, SpikingBrainError
from spikingbrain_train.evaluation.multiple_choice import plan as planned
from spikingbrain_train.evaluation.multiple_choice.plan import TaskPlan
from spikingbrain_train.evaluation.multiple_choice.task_files import LETTERS, TASKS
from tests.evaluation.multiple_choice.small_tasks import ROWS, write_tasks
from tests.evaluation.multiple_choice.small_tasks import TASKS as ALL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path)


def test_all_tasks_are_read_in_either_layout_of_subjects(folder: Path) -> None:
    plan = TaskPlan.of(ALL, folder, limit=4)
    assert [asked.name for asked in plan.tasks] == ALL.split(",")
    found = {asked.name: asked.subjects for asked in plan.tasks}
    assert found["mmlu"] == ("anatomy", "virology") and found["cmmlu"] == ("agronomy",)
    assert found["ceval"] == ("law",) and found["piqa"] == (None,)
    mmlu, cmmlu = plan.tasks[:2]
    assert [each["answer"] for each in plan.questions(mmlu, "virology")] == [3, 0, 1]
    assert len(plan.questions(mmlu, "anatomy")) == 4 and len(plan.questions(cmmlu, "agronomy")) == 3
    one = TaskPlan.of("mmlu_virology,ceval_law", folder, num_fewshot=0)
    assert [asked.name for asked in one.tasks] == ["mmlu_virology", "ceval_law"]
    assert len(TaskPlan.of("mmlu_virology", folder, num_fewshot=2).examples(one.tasks[0], "virology")) == 2


def test_a_shift_moves_options_and_the_right_one_alike() -> None:
    for name in ("mmlu", "cmmlu", "ceval"):
        task = TASKS[name]
        assert task.shift is not None
        (rows,) = [rows for key, rows in ROWS.items() if key.startswith(f"{name}/{task.split}")][:1]
        question = task.read(rows[1])
        texts = []
        for places in range(4):
            moved = task.shift(question, places)
            options = moved.get("choices") or [moved[letter] for letter in LETTERS]
            right = moved.get("answer", moved.get("Answer"))
            texts.append(options[right if isinstance(right, int) else LETTERS.index(right)])
            assert options[0] == (question.get("choices") or [question[x] for x in LETTERS])[places]
        assert len(set(texts)) == 1
        assert task.shift(question, 0) == question


WRONG: list[tuple[str, dict[str, Any] | str | None, str]] = [
    ("piqa/validation", None, "piqa: {path} does not exist; put the dataset's validation split there"),
    ("piqa/validation", "", "piqa: {path} holds no question"),
    ("piqa/validation", "{", "piqa: {path} line 2 is no JSON"),
    ("piqa/validation", "[1]", "piqa: {path} line 2 is no JSON object"),
    ("piqa/validation", {"goal": "x"}, "piqa: {path} line 2 has no field 'sol1'; its fields are 'goal'"),
    ("piqa/validation", {"goal": "x", "sol1": 1, "sol2": "c"}, "line 2 has 1 in the field 'sol1'"),
    (
        "piqa/validation",
        {"goal": "x", "sol1": "b", "sol2": "c", "label": 2},
        "line 2 has 2 in the field 'label'",
    ),
    ("mmlu/test/anatomy", {"question": "x", "choices": ["a"]}, "field 'choices'; give a list of 4 texts"),
    ("mmlu/test/anatomy", {"question": "x", "choices": list("abcd"), "answer": "AB"}, "'AB' in the field"),
    ("cmmlu/test", {"Question": "x"}, "cmmlu: {path} line 2 has no field 'subject'; add it, or give every"),
    ("arc_challenge/test", {"question": "x"}, "line 2 has no question with choices"),
    (
        "arc_challenge/test",
        {"question": "x", "choices": {"text": ["a", "b"], "label": ["1", "3"]}, "answerKey": "2"},
        "answerKey '2', which is none",
    ),
    (
        "arc_challenge/test",
        {"question": "x", "choices": {"text": ["a"], "label": ["1"]}, "answerKey": "1"},
        "has the labels ['1']; give at least two options, each with a label of its own",
    ),
    (
        "arc_challenge/test",
        {"question": "x", "choices": {"text": ["a", "b"], "label": ["1", "1"]}, "answerKey": "1"},
        "has the labels ['1', '1']; give at least two options, each with a label of its own",
    ),
    *(
        (
            name,
            {**ROWS[name][0], field: empty},
            f"line 2 has an empty option in the field '{field}'; give its",
        )
        for name, field, empty in (
            ("piqa/validation", "sol2", " "),
            ("winogrande/validation", "option1", ""),
            ("hellaswag/validation", "endings", ["a", "b", "", "d"]),
            ("arc_challenge/test", "choices", {"text": ["", "b"], "label": ["A", "B"]}),
        )
    ),
    *(
        (name, {**ROWS[name][0], field: half}, f"line 2 has an unpaired surrogate in the field '{field}'")
        for name, field, half in (
            ("piqa/validation", "goal", "\ud800"),
            ("mmlu/test/anatomy", "choices", ["\udfff", "b", "c", "d"]),
            ("arc_challenge/test", "question", "\ud800"),
        )
    ),
    ("piqa/validation", "[" * 100_000, "piqa: {path} line 2 is no JSON"),
    (
        "winogrande/validation",
        {"sentence": "x", "option1": "a", "option2": "b", "answer": "1"},
        "has no _ in the field 'sentence'",
    ),
    (
        "hellaswag/validation",
        {"activity_label": "x", "ctx_a": "x", "ctx_b": "x", "endings": list("abcd"), "label": ""},
        "line 2 has '' in the field 'label'; give a number from 0 to 3 or a letter up to D",
    ),
]


@pytest.mark.parametrize(("name", "line", "sentence"), WRONG, ids=[each[2][-50:] for each in WRONG])
def test_a_wrong_file_is_named_with_its_line(name: str, line: Any, sentence: str, folder: Path) -> None:
    path = folder / f"{name}.jsonl"
    if line is None:
        path.unlink()
    elif line == "":
        path.write_text("\n")
    else:
        first = json.dumps(ROWS[name][0])
        path.write_text(f"{first}\n{line if isinstance(line, str) else json.dumps(line)}\n")
    with pytest.raises(DataError) as error:
        TaskPlan.of(name.split("/")[0], folder)
    assert sentence.format(path=path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "options", "sentence"),
    [
        ("piqua", {}, "--tasks names 'piqua', which is none of mmlu, .*; did you mean piqa?"),
        ("mmlu_anatomi", {}, "mmlu: 'anatomi' is no subject that lm-eval defines; did you mean anatomy?"),
        ("piqa,piqa", {}, "--tasks names piqa more than once"),
        (
            "piqa",
            {"permutations": True},
            "with letters, which piqa do not; add one of mmlu, cmmlu, ceval",
        ),
        (
            "mmlu",
            {"num_fewshot": 3},
            "holds 2 examples, but --num-fewshot is 3; give 2 or fewer",
        ),
        ("piqa", {"num_fewshot": 1}, "train.jsonl does not exist"),
        ("piqa", {"num_fewshot": -1}, "--num-fewshot is -1; give 0 or more"),
        ("piqa", {"limit": 0}, "--limit is 0; give at least 1"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    names: str, options: dict[str, Any], sentence: str, folder: Path
) -> None:
    with pytest.raises(SpikingBrainError, match=sentence):
        TaskPlan.of(names, folder, **options)


def test_a_folder_must_be_named_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="name the folder .* with --task-data"):
        TaskPlan.of("piqa", None)
    with pytest.raises(DataError, match="is not a folder"):
        TaskPlan.of("piqa", tmp_path / "nowhere")


def test_without_lm_eval_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match=r"the extra evaluation: pip install 'spikingbrain-train\[eva"):
        TaskPlan.of("piqa", folder)
