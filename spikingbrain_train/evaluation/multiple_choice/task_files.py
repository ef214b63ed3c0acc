"""The tasks, the files that hold their questions, and what a line of them has. Without torch and lm-eval.

A task is a folder of JSON lines with the fields of the original dataset, one file a split:
``<folder>/<task>/<split>.jsonl``. Tasks of many subjects may also have a file for each:
``<folder>/<task>/<split>/<subject>.jsonl``; in one file the field ``subject`` tells them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain_train.errors import DataError

LETTERS = "ABCD"

Question = dict[str, Any]
"""A line as lm-eval's definition of the task reads it."""


@dataclass(frozen=True)
class ChoiceTask:
    """A task as lm-eval defines it."""

    name: str
    """As users and folders call it."""
    definition: str
    """File of lm-eval's definition below its folder of tasks; ``{subject}`` stands for a subject."""
    split: str
    """That is asked."""
    shots_split: str
    """That solved examples in front of a question come from."""
    read: Callable[[Mapping[str, Any]], Question]
    """Of a line; raises ValueError with what is wrong with it."""
    has_subjects: bool = False
    shift: Callable[[Question, int], Question] | None = None
    """The question with its options moved up by so many places, where a prompt shows options with letters."""

    def path(self, folder: Path, split: str, subject: str | None) -> Path:
        """Where the questions of a split are."""
        of_subject = folder / self.name / split / f"{subject}.jsonl"
        whole = folder / self.name / f"{split}.jsonl"
        return of_subject if self.has_subjects and not whole.is_file() else whole

    def subjects(self, folder: Path) -> list[str]:
        """Those that the files have, in alphabetical order.

        Raises:
            DataError: there are none.
        """
        whole, of_subjects = folder / self.name / f"{self.split}.jsonl", folder / self.name / self.split
        if whole.is_file():
            return sorted({_subject(row, whole, number) for number, row in _lines(self.name, whole)})
        found = sorted(path.stem for path in of_subjects.glob("*.jsonl"))
        if not found:
            raise DataError(
                f"{self.name}: there is no {whole} and no {of_subjects}/<subject>.jsonl; put the dataset's "
                "questions there as JSON lines (docs/evaluation.md has the fields)"
            )
        return found

    def questions(self, folder: Path, split: str, subject: str | None = None) -> list[Question]:
        """Every question of a split, at least one.

        Raises:
            DataError: the file is missing or empty, or a line lacks a field; the sentence names task, file
                and line.
        """
        path = self.path(folder, split, subject)
        if not path.is_file():
            raise DataError(
                f"{self.name}: {path} does not exist; put the dataset's {split} split there as JSON lines "
                "(docs/evaluation.md has the fields)"
            )
        in_one_file = self.has_subjects and path.stem == split
        found = []
        for number, row in _lines(self.name, path):
            if in_one_file and _subject(row, path, number) != subject:
                continue
            try:
                found.append(self.read(row))
            except ValueError as error:
                raise DataError(f"{self.name}: {path} line {number} {error}") from None
        if not found:
            of_subject = f" of the subject {subject}" if in_one_file else ""
            raise DataError(
                f"{self.name}: {path} holds no question{of_subject}; copy the dataset's file again"
            )
        return found


def _lines(task: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{task}: {path} cannot be read as UTF-8 text ({error}); copy it again") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{task}: {path} line {number} is no JSON ({error}); write one question a line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{task}: {path} line {number} is no JSON object; write one question a line")
        found.append((number, row))
    return found


def _subject(row: Mapping[str, Any], path: Path, number: int) -> str:
    subject = row.get("subject")
    if not isinstance(subject, str) or not subject:
        raise DataError(
            f"{path.parent.name}: {path} line {number} has no field 'subject'; add it, or give every subject "
            f"a file of its own: {path.with_suffix('')}/<subject>.jsonl"
        )
    return subject


def _text(row: Mapping[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise ValueError(f"has {value!r} in the field {name!r}; give a text")
    return _spelt(value, name)


def _spelt(text: str, name: str) -> str:
    """A text that UTF-8 can spell: JSON can also hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"has an unpaired surrogate in the field {name!r}; repair the text") from None
    return text


def _option(row: Mapping[str, Any], name: str) -> str:
    """An option whose own text is scored, not a letter in front of it."""
    return _not_empty(_text(row, name), name)


def _not_empty(text: str, name: str) -> str:
    if not text.strip():
        raise ValueError(f"has an empty option in the field {name!r}; give its text, or remove the question")
    return text


def _texts(row: Mapping[str, Any], name: str, number: int | None = None) -> list[str]:
    value = _field(row, name)
    count = "" if number is None else f"{number} "
    fits = isinstance(value, list) and value and all(isinstance(each, str) for each in value)
    if not fits or number not in (None, len(value)):
        raise ValueError(f"has {value!r} in the field {name!r}; give a list of {count}texts")
    return [_spelt(each, name) for each in value]


def _index(row: Mapping[str, Any], name: str, number: int) -> int:
    """The place of the right option, from 0, or its letter."""
    value = _field(row, name)
    text = str(value).strip()
    if len(text) == 1 and text in LETTERS[:number]:
        return LETTERS.index(text)
    if isinstance(value, bool) or not text.isdecimal() or int(text) >= number:
        last = f"{number - 1} or a letter up to {LETTERS[number - 1]}"
        raise ValueError(f"has {value!r} in the field {name!r}; give a number from 0 to {last}")
    return int(text)


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"has no field {name!r}; its fields are {', '.join(map(repr, row)) or 'none'}")
    return row[name]


def _mmlu(row: Mapping[str, Any]) -> Question:
    return {
        "question": _text(row, "question"),
        "choices": _texts(row, "choices", 4),
        "answer": _index(row, "answer", 4),
    }


def _lettered(question: str, answer: str) -> Callable[[Mapping[str, Any]], Question]:
    def read(row: Mapping[str, Any]) -> Question:
        options = {letter: _text(row, letter) for letter in LETTERS}
        right = LETTERS[_index(row, answer, 4)]
        return {question: _text(row, question), **options, answer: right}

    return read


def _arc(row: Mapping[str, Any]) -> Question:
    question: Any = _field(row, "question")
    choices: Any = row.get("choices")
    if isinstance(question, dict):  # as AI2 published it; the Hugging Face form has columns
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, list) and all(isinstance(each, dict) for each in choices):
        choices = {name: [each.get(name) for each in choices] for name in ("text", "label")}
    if not isinstance(question, str) or not isinstance(choices, dict):
        raise ValueError(
            "has no question with choices; give 'question', 'choices' {text, label}, 'answerKey'"
        )
    _spelt(question, "question")
    labels, texts = _texts(choices, "label"), _texts(choices, "text")
    right = _text(row, "answerKey")
    if len(texts) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"has the labels {labels}; give at least two options, each with a label of its own")
    for text in texts:
        _not_empty(text, "choices")
    if len(labels) != len(texts) or right not in labels:
        raise ValueError(f"has the answerKey {right!r}, which is none of the labels {labels}; correct it")
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": right}


def _hellaswag(row: Mapping[str, Any]) -> Question:
    endings = [_not_empty(text, "endings") for text in _texts(row, "endings", 4)]
    texts = {name: _text(row, name) for name in ("activity_label", "ctx_a", "ctx_b")}
    return {**texts, "endings": endings, "label": str(_index(row, "label", 4))}


def _winogrande(row: Mapping[str, Any]) -> Question:
    texts = {
        "sentence": _text(row, "sentence"),
        **{name: _option(row, name) for name in ("option1", "option2")},
    }
    answer = str(_field(row, "answer"))
    if "_" not in texts["sentence"]:
        raise ValueError("has no _ in the field 'sentence', where an option belongs; correct it")
    if answer not in ("1", "2"):
        raise ValueError(f"has {answer!r} in the field 'answer'; give '1' or '2'")
    return {**texts, "answer": answer}


def _piqa(row: Mapping[str, Any]) -> Question:
    texts = {"goal": _text(row, "goal"), **{name: _option(row, name) for name in ("sol1", "sol2")}}
    return {**texts, "label": _index(row, "label", 2)}


def _shift_choices(question: Question, places: int) -> Question:
    choices = question["choices"]
    moved = [choices[(at + places) % 4] for at in range(4)]
    return {**question, "choices": moved, "answer": (question["answer"] - places) % 4}


def _shift_letters(answer: str) -> Callable[[Question, int], Question]:
    def shift(question: Question, places: int) -> Question:
        moved = {letter: question[LETTERS[(at + places) % 4]] for at, letter in enumerate(LETTERS)}
        right = LETTERS[(LETTERS.index(question[answer]) - places) % 4]
        return {**question, **moved, answer: right}

    return shift


TASKS = {
    task.name: task
    for task in (
        ChoiceTask(
            "mmlu",
            "mmlu/default/mmlu_{subject}.yaml",
            "test",
            "dev",
            _mmlu,
            has_subjects=True,
            shift=_shift_choices,
        ),
        ChoiceTask(
            "cmmlu",
            "cmmlu/cmmlu_{subject}.yaml",
            "test",
            "dev",
            _lettered("Question", "Answer"),
            has_subjects=True,
            shift=_shift_letters("Answer"),
        ),
        ChoiceTask(
            "ceval",
            "ceval/ceval-valid_{subject}.yaml",
            "val",
            "dev",
            _lettered("question", "answer"),
            has_subjects=True,
            shift=_shift_letters("answer"),
        ),
        ChoiceTask("arc_challenge", "arc/arc_challenge.yaml", "test", "train", _arc),
        ChoiceTask("hellaswag", "hellaswag/hellaswag.yaml", "validation", "train", _hellaswag),
        ChoiceTask("winogrande", "winogrande/default.yaml", "validation", "train", _winogrande),
        ChoiceTask("piqa", "piqa/piqa.yaml", "validation", "train", _piqa),
    )
}
"""In the order in which SpikingBrain (arXiv 2509.05276, tables 1 to 3) and its peers report them."""
