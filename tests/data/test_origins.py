"""Which documents a sample is made of. Tokens are their positions in the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spikingbrain_train.config.run import DataConfig, LongDocumentsConfig
from spikingbrain_train.config.stage import LongExamples
from spikingbrain_train.data.gpt_dataset import TrainDataset, build_datasets
from spikingbrain_train.data.origins import origins
from spikingbrain_train.data.packed_examples import PackedExamples
from spikingbrain_train.data.token_file import TokenFile
from tests.data.conftest import WriteTokens
from tests.data.test_packed_examples import LENGTH, make

SEQ = 8
LENGTHS = [3, 30, 5, 9, 0, 8, 2, 17, 40, 4]
STARTS = np.concatenate(([0], np.cumsum(LENGTHS)))
DOCUMENT = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
"""Of each token, the empty one counted."""

WAYS = {
    "as they lie": DataConfig(),
    "by domain, long ones first": DataConfig(
        pack_by_domain=True, long_documents=LongDocumentsConfig(share=0.5)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_that_are_named_are_those_of_the_sample(way: str, write_tokens: WriteTokens) -> None:
    documents = [range(a, b) for a, b in zip(STARTS, STARTS[1:], strict=False)]
    data = WAYS[way]
    data.train = [write_tokens(name, documents, domains=["a", "b"] * 5) for name in ("one", "two")]
    dataset, _ = build_datasets(data, SEQ, 40, seed=3)
    found = origins(dataset, range(40))
    assert [each["sample"] for each in found] == list(range(40))
    assert {each["prefix"] for each in found} == set(data.train)
    for each in found:
        sample = dataset[each["sample"]]
        expected = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        assert [token for first, last in each["tokens"] for token in range(first, last + 1)] == expected
        assert each["documents"] == [[DOCUMENT[first], DOCUMENT[last]] for first, last in each["tokens"]]


def test_the_examples_of_a_sequence_are_named(tmp_path: Any) -> None:
    prefix, *_ = make(tmp_path / "d")
    part = PackedExamples(prefix, LENGTH, next(iter(LongExamples)), seed=(7, 0))
    dataset = TrainDataset([part], None, 2 * part.windows_per_epoch)
    file = TokenFile(prefix)
    for each in origins(dataset, range(len(dataset))):
        sample = dataset[each["sample"]]
        bounds = sample["cu_seqlens"].tolist()
        for (first, last), begin, end in zip(each["tokens"], bounds, bounds[1:], strict=False):
            assert file.read(first, last - first).tolist() == sample["tokens"][begin:end].tolist()
        assert [first for first, _ in each["documents"]] == part.examples(each["sample"]).tolist()
