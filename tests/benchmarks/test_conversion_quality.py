"""What benchmarks/conversion_quality.py measures on, and what it counts."""

import random
from pathlib import Path

import pytest

from benchmarks.conversion_methods import CALIBRATION_TOKENS, METHODS
from benchmarks.conversion_runs import Bench
from benchmarks.conversion_texts import check_unseen
from spikingbrain_train.errors import DataError


def _document(seed: int) -> str:
    return " ".join(random.Random(seed).choices([f"word{number}" for number in range(500)], k=400))


def test_a_text_that_is_trained_on_is_refused_whatever_its_line_breaks_and_signs():
    known = _document(1).replace(" ", ",\n").upper()
    with pytest.raises(
        DataError, match=r"100% of the runs of 13 words of the text topics occur in the text to train on"
    ):
        check_unseen("topics", [known], [_document(2), f"before {_document(1)} behind"])


def test_the_share_that_two_texts_have_in_common_is_told():
    document = _document(1)
    half = " ".join(document.split()[:40])
    assert check_unseen("docs", [document], [half]) == pytest.approx((40 - 12) / (400 - 12))
    assert check_unseen("docs", [document], [_document(2), "short"]) == 0


@pytest.mark.parametrize("name", METHODS)
def test_tokens_of_a_method_are_all_that_it_reads(name: str):
    method, budget = METHODS[name], 250_000
    bench = Bench(Path("output"), Path("model"), Path("train"), Path("valid"), "cpu", None)
    read = method.conversion.tokens_read
    for stage, steps in bench.steps(method, budget):
        read += steps * stage.seq_length if steps else CALIBRATION_TOKENS
    longest = max(stage.seq_length for stage in method.stages)
    assert abs(read - budget) <= longest * len(method.stages)
    assert (method.conversion.tokens_read > 0) == (method.conversion.choice is not None)
