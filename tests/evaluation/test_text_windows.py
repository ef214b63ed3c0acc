"""Windows of indexed datasets that commands which look inside a model read."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from spikingbrain_train.data.preprocess import preprocess
from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.errors import DataError
from spikingbrain_train.evaluation.text_windows import windows_of_data
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source

LENGTH = 16


def test_windows_of_several_datasets_are_text_alone(tmp_path: Path) -> None:
    """What is left at the end of the first one is padded in evaluations, which do not count that."""
    source = save_small_source(tmp_path / "source")
    tokenizer, expected, prefixes = AutoTokenizer.from_pretrained(source), [], []
    for name, text in (("digits", "0123456789 " * 5), ("letters", "abcdefghij " * 9)):
        (tmp_path / f"{name}.txt").write_text(text)
        prefixes.append(str(tmp_path / name))
        preprocess(PreprocessOptions([str(tmp_path / f"{name}.txt")], prefixes[-1], str(source)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        full = (len(ids) - 1) // LENGTH
        assert full and (len(ids) - 1) % LENGTH
        expected += [ids[LENGTH * index : LENGTH * (index + 1) + 1] for index in range(full)]
    found = windows_of_data(prefixes, source, MODEL_VOCAB_SIZE, len(expected), LENGTH)
    assert found == expected
    with pytest.raises(DataError, match=f"holds {len(expected)} windows of {LENGTH} tokens, not"):
        windows_of_data(prefixes, source, MODEL_VOCAB_SIZE, len(expected) + 1, LENGTH)
