"""From a model, sample texts of bricks and prompts to a choice, its scores and how far it can be trusted."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from spikingbrain_train.bricks.route import Retriever, embed
from spikingbrain_train.data.documents import find_sources
from spikingbrain_train.errors import DataError
from spikingbrain_train.evaluation.output import show_text, write_result
from spikingbrain_train.evaluation.reading_command_line import open_folder
from spikingbrain_train.evaluation.text_windows import windows_of_text
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.reporting.tables import facts, table, terminal_width


def run(arguments: argparse.Namespace) -> None:
    """Embed, choose, print and write.

    Args:
        arguments: of ``spikingbrain-bricks route``.

    Raises:
        DataError: a text cannot be read or is too short, or a prompt has no tokens.
    """
    model, tokenizer = open_folder(arguments)
    half, length = arguments.windows // 2, arguments.seq_length
    learnt, held_out = {}, {}
    for name, file in arguments.bricks.items():
        windows = windows_of_text(
            [file], arguments.text_key, tokenizer, arguments.windows, length, "--bricks"
        )
        with activity(f"reading samples of {name}"):
            embedded = embed(model, [window[:length] for window in windows])
        learnt[name], held_out[name] = embedded[:half], embedded[half:]
    retriever = Retriever.of(learnt)
    names = retriever.names
    found = {
        name: [names[place] for place in retriever.scores(each).argmax(-1).tolist()]
        for name, each in held_out.items()
    }
    own = sum(found[name].count(name) for name in names)
    prompts = list(_prompts(arguments))
    ids = [tokenizer.encode(prompt)[:length] for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise DataError(f"the prompt {prompt!r} has no tokens; give it some text")
    scores = retriever.scores(embed(model, ids)) if ids else torch.empty(0, len(names))
    choices = [names[place] for place in scores.argmax(-1).tolist()]
    lines = facts(
        [
            ("model", str(arguments.model)),
            ("bricks", f"{', '.join(names)}, each of {half} windows of {length} tokens"),
            ("held out", f"{own} of {half * len(names)} other windows of the bricks' texts find their own"),
        ],
        terminal_width(),
    )
    if prompts:
        rows = [["prompt", *names, "chosen"]]
        for prompt, row, choice in zip(prompts, scores.tolist(), choices, strict=True):
            rows.append([_short(prompt), *(f"{score:+.3f}" for score in row), choice])
        lines += ["", *table(rows, left=1)]
    show_text("\n".join(lines))
    if arguments.output is not None:
        result = {
            "model": str(arguments.model),
            "bricks": arguments.bricks,
            "held_out": found,
            "prompts": [
                {"prompt": prompt, "chosen": choice, "scores": dict(zip(names, row, strict=True))}
                for prompt, choice, row in zip(prompts, choices, scores.tolist(), strict=True)
            ],
        }
        write_result(arguments.output, result)


def _prompts(arguments: argparse.Namespace) -> Iterator[str]:
    yield from arguments.prompt
    if arguments.prompts is not None:
        for source in find_sources([arguments.prompts]):
            for document in source.read():
                yield document.text(arguments.text_key)


def _short(prompt: str, length: int = 40) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."
