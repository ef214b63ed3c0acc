"""A few questions of every task, written for these tests, in the fields of the original datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_FACTS = [
    ("Which of these is a fruit?", ["apple", "brick", "cloud", "spoon"], 0),
    ("How many legs has a spider?", ["four", "six", "eight", "ten"], 2),
    ("What do bees make?", ["milk", "honey", "paper", "glass"], 1),
    ("Which month comes after May?", ["April", "March", "July", "June"], 3),
    ("What is frozen water called?", ["ice", "steam", "sand", "oil"], 0),
    ("Which of these can fly?", ["a stone", "a sparrow", "a table", "a whale"], 1),
]


def _letters(question: str, answer: str, facts: list[tuple[str, list[str], int]]) -> list[Row]:
    return [
        {question: text, **dict(zip("ABCD", options, strict=True)), answer: "ABCD"[right]}
        for text, options, right in facts
    ]


ROWS: dict[str, list[Row]] = {
    "mmlu/test/anatomy": [
        {"question": text, "choices": options, "answer": right} for text, options, right in _FACTS[:5]
    ],
    "mmlu/test/virology": [
        {"question": text, "choices": options, "answer": "ABCD"[right]} for text, options, right in _FACTS[3:]
    ],
    "mmlu/dev/anatomy": [
        {"question": text, "choices": options, "answer": right} for text, options, right in _FACTS[4:]
    ],
    "mmlu/dev/virology": [
        {"question": text, "choices": options, "answer": right} for text, options, right in _FACTS[:2]
    ],
    "cmmlu/test": [{**row, "subject": "agronomy"} for row in _letters("Question", "Answer", _FACTS[:3])],
    "ceval/val/law": _letters("question", "answer", _FACTS[1:4]),
    "arc_challenge/test": [
        {
            "id": str(number),
            "question": text,
            "choices": {"text": options, "label": list("ABCD")},
            "answerKey": "ABCD"[right],
        }
        for number, (text, options, right) in enumerate(_FACTS[:3])
    ]
    + [
        {
            "id": "as published",
            "question": {
                "stem": "Which is a colour?",
                "choices": [{"text": "red", "label": "1"}, {"text": "loud", "label": "2"}],
            },
            "answerKey": "1",
        }
    ],
    "arc_challenge/train": [
        {"question": text, "choices": {"text": options, "label": list("1234")}, "answerKey": "1234"[right]}
        for text, options, right in _FACTS[3:]
    ],
    "hellaswag/validation": [
        {
            "activity_label": "Baking",
            "ctx_a": "A man mixes flour and water.",
            "ctx_b": "then he",
            "endings": ["kneads the dough [step] well.", "paints a wall.", "flies away.", "reads the sea."],
            "label": "0",
            "split": "val",
        },
        {
            "activity_label": "Washing hands",
            "ctx_a": "A girl opens the tap.",
            "ctx_b": "she",
            "endings": [
                "eats the soap.",
                "closes her eyes and runs.",
                "holds her hands under it.",
                "sings it.",
            ],
            "label": 2,
        },
    ],
    "winogrande/validation": [
        {
            "sentence": "The cup did not fit on the shelf because the _ was too tall.",
            "option1": "cup",
            "option2": "shelf",
            "answer": "1",
        },
        {
            "sentence": "Ann lent Beth a coat because _ was cold.",
            "option1": "Ann",
            "option2": "Beth",
            "answer": 2,
        },
    ],
    "piqa/validation": [
        {
            "goal": "dry a wet book",
            "sol1": "put it into a lake",
            "sol2": "stand it up in the air",
            "label": 1,
        },
        {"goal": "cut bread", "sol1": "use a knife", "sol2": "use a balloon", "label": "0"},
        {"goal": "keep milk cool", "sol1": "fridge", "sol2": "oven", "label": 0},
    ],
}
TASKS = "mmlu,cmmlu,ceval,arc_challenge,hellaswag,winogrande,piqa"


def write_tasks(folder: Path) -> Path:
    """All of them below ``folder``."""
    for name, rows in ROWS.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder
