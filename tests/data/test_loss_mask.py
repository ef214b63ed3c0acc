"""The file that says which tokens carry loss: written with a dataset, read back, and refused when it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spikingbrain_train.config.run_record import fingerprint
from spikingbrain_train.data.indexed import IndexedDatasetWriter
from spikingbrain_train.data.lengths import describe_dataset
from spikingbrain_train.data.loss_mask import LossMask, open_loss_mask
from spikingbrain_train.data.token_file import TokenFile, document_starts
from spikingbrain_train.errors import DataError
from tests.data.conftest import CountingTokenizer
from tests.data.preprocess_command import exit_code_of
from tests.data.test_chat_loss import CHATML


def write_examples(folder: Path, examples: list[list[int]], loss: list[list[int]]) -> str:
    """A dataset whose tokens and masks are known."""
    (folder / "staging").mkdir(parents=True)
    writer = IndexedDatasetWriter(folder / "d", CountingTokenizer(), folder / "staging", with_loss_mask=True)
    for ids, each in zip(examples, loss, strict=True):
        writer.add_document(np.asarray(ids, writer.dtype), 1, np.asarray(each, bool))
    writer.finish()
    writer.publish()
    return str(folder / "d")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    random = np.random.RandomState(0)
    examples = [list(range(1, 1 + random.randint(2, 40))) for _ in range(50)]
    loss = [[0, *random.randint(0, 2, len(ids) - 2), 1] for ids in examples]
    prefix = write_examples(tmp_path / "written", examples, loss)
    np.save(tmp_path / "expected.npy", np.concatenate(loss).astype(bool))
    return prefix


def test_what_was_written_is_read(prefix: str, tmp_path: Path) -> None:
    expected, mask = np.load(tmp_path / "expected.npy"), open_loss_mask(prefix)
    for start, count in ((0, len(expected)), (3, 1), (8, 16), (7, 30), (len(expected) - 1, 1)):
        assert mask.read(start, count).tolist() == expected[start : start + count].tolist()
    starts = document_starts(TokenFile(prefix))
    for number, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        where = np.flatnonzero(expected[start:end])
        assert (mask.first[number], mask.last[number]) == (where[0], where[-1])
    assert mask.loss_tokens == expected.sum()
    assert mask.turns() == (np.diff(np.concatenate(([0], expected.astype(int)))) == 1).sum()
    assert sorted(path.name for path in Path(prefix).parent.iterdir() if path.is_file()) == [
        "d.bin",
        "d.idx",
        "d.json",
        "d.loss_mask",
    ]


def test_a_mask_that_is_damaged_or_of_other_tokens_is_refused(prefix: str, tmp_path: Path) -> None:
    path = Path(f"{prefix}.loss_mask")
    whole = path.read_bytes()
    for content, reason in (
        (whole[:40], "its head alone takes"),
        (whole[:-1], "bytes long instead of"),
        (whole[:-1] + bytes([whole[-1] ^ 128]), "does not have the hash"),
        (b"x" * 200, "is no loss mask that this release reads"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason) as caught:
            open_loss_mask(prefix)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    tokens = Path(f"{prefix}.bin")
    tokens.write_bytes(bytes([tokens.read_bytes()[0] ^ 1]) + tokens.read_bytes()[1:])
    with pytest.raises(DataError, match="belongs to other tokens than"):
        open_loss_mask(prefix)
    path.unlink()
    with pytest.raises(DataError, match="--chat-key messages --loss-on assistant"):
        LossMask(TokenFile(prefix))


def test_a_run_that_goes_on_notices_another_mask(prefix: str) -> None:
    before, path = fingerprint(prefix), Path(f"{prefix}.loss_mask")
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    assert fingerprint(prefix).digest != before.digest


@pytest.fixture(scope="module")
def chats(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenizer folder with a template, and a file of conversations."""
    folder = tmp_path_factory.mktemp("chats")
    template = CHATML.replace("<|im_start|>", "<|").replace("<|im_end|>", "<|end|>")
    shutil.copytree(hf_folder, folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    records = [
        [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"It is {n}. " * (1 + n % 7)},
        ]
        for n in range(60)
    ]
    lines = [json.dumps({"messages": record}) + "\n" for record in records]
    (folder / "in.jsonl").write_text("".join(lines))
    return folder / "tokenizer", folder / "in.jsonl"


def run(chats: tuple[Path, Path], prefix: Path, *flags: str, source: Path | None = None) -> int:
    known = ["--input", str(source or chats[1]), "--tokenizer", str(chats[0]), "--output-prefix", str(prefix)]
    return exit_code_of([*known, "--chat-key", "messages", "--workers", "1", *flags])


LEARN = ("--loss-on", "assistant")


def test_command_writes_examples_and_says_how_much_is_learnt(
    chats: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(chats, tmp_path / "d", *LEARN, "--seq-length", "80", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["datasets"]
    mask = open_loss_mask(tmp_path / "d")
    assert found["documents"] == found["answers"]["turns"] == 60
    assert found["answers"]["loss_tokens"] == mask.loss_tokens == mask.read(0, mask.num_tokens).sum()
    assert found["answers"]["longer"] == (mask.last > 80).sum() > 0
    assert found["answers"]["without_loss"] == (mask.first > 80).sum()
    assert exit_code_of(["--describe", str(tmp_path / "d"), "--seq-length", "80"]) == 0
    out = capsys.readouterr().out
    assert "tokens with loss" in out and "longer than 80" in out
    assert run(chats, tmp_path / "e", *LEARN, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "of them with loss" in out and "{bin,idx,json,loss_mask}" in out


@pytest.mark.parametrize("flags", [("--valid-fraction", "0.3"), ("--valid-tokens", "600")])
def test_masks_go_with_their_examples_to_either_side(
    chats: tuple[Path, Path], tmp_path: Path, flags: tuple[str, str]
) -> None:
    assert run(chats, tmp_path / "whole", *LEARN) == run(chats, tmp_path / "d", *LEARN, *flags) == 0

    def contents(prefix: Path) -> list[tuple[list[int], list[bool]]]:
        dataset, mask = TokenFile(str(prefix)), open_loss_mask(prefix)
        starts = document_starts(dataset)
        return [
            (dataset.read(start, end - start).tolist(), mask.read(start, end - start).tolist())
            for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        ]

    train, valid = contents(tmp_path / "d_train"), contents(tmp_path / "d_valid")
    assert train and valid
    assert sorted(train + valid) == sorted(contents(tmp_path / "whole"))


def test_text_written_over_examples_takes_their_mask_away(chats: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(chats, tmp_path / "d", *LEARN) == 0
    assert run(chats, tmp_path / "d", *LEARN) == 2  # exists already
    assert run(chats, tmp_path / "d", "--overwrite") == 0
    assert not (tmp_path / "d.loss_mask").exists()
    assert describe_dataset(tmp_path / "d").answers is None


def test_bad_records_are_named_together_or_left_out_and_counted(
    chats: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = chats[1].read_text()
    bad = [{"messages": [{"role": "user", "content": "x"}]}, {"text": "x"}, {"messages": [3]}]
    source = tmp_path / "bad.jsonl"
    source.write_text(good + "".join(json.dumps(record) + "\n" for record in bad * 2) + "{\n")
    assert run(chats, tmp_path / "d", *LEARN, source=source) == 2
    said = capsys.readouterr().err
    for line in (61, 62, 63, 64):
        assert f"{source}:{line}: " in said
    assert "none of its messages is of the assistant" in said and "and 3 more near these" in said
    assert list(tmp_path.iterdir()) == [source]
    assert run(chats, tmp_path / "d", *LEARN, "--skip-bad-documents", source=source) == 0
    assert "dropped 7 bad documents, 0 of them empty; the first: " in capsys.readouterr().out
    assert describe_dataset(tmp_path / "d").summary.documents == 60


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--loss-on", "assistant"), "name the field that holds the messages with --chat-key"),
        (("--chat-key", "messages", "--seq-length", "8"), "--seq-length counts examples that are longer"),
        (("--chat-key", "messages", *LEARN, "--seq-length", "0"), "--seq-length is 0: give at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    chats: tuple[Path, Path],
    tmp_path: Path,
    flags: tuple[str, ...],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = ["--input", str(chats[1]), "--tokenizer", str(chats[0]), "--output-prefix", str(tmp_path / "d")]
    assert exit_code_of([*known, *flags]) == 2
    assert reason in capsys.readouterr().err
    source = tmp_path / "plain.txt"
    source.write_text("text")
    assert run(chats, tmp_path / "e", *LEARN, source=source) == 2
    assert "a text file holds no conversation" in capsys.readouterr().err
