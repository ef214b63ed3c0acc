"""The account of a conversion closes when every tensor went somewhere, once, and not otherwise."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from spikingbrain_train.conversion.account import Account, Use
from spikingbrain_train.conversion.safetensors_io import TensorSpec
from spikingbrain_train.errors import CheckpointError

ROWS = bytes(range(48))  # of float16 [4, 6]


def account() -> Account:
    specs = {name: TensorSpec(name, (4, 6), torch.float16) for name in ("q", "up", "spare")}
    return Account(specs, {("q", "linear_q"), ("up", "fc1")}, {"spare": "is not needed"})


def use(tensor: str, parameter: str, first: int = 0, end: int = 4) -> Use:
    data = ROWS[12 * first : 12 * end]
    return Use(tensor, parameter, zlib.crc32(data), len(data), first)


UP = [use("up", "fc1", 2, 4), use("up", "fc1", 0, 2)]  # in two parts, in any order


def test_an_account_that_balances_holds_the_checksum_of_every_tensor() -> None:
    tensors = account().close([use("q", "linear_q"), *UP])["tensors"]
    whole = f"{zlib.crc32(ROWS):08x}"
    assert tensors["q"]["crc32"] == tensors["up"]["crc32"] == whole
    assert tensors["up"]["parameters"] == ["fc1"] and tensors["spare"]["left_out"] == "is not needed"
    assert account().close([use("q", "linear_q"), *UP, UP[0]])  # a copy for another part, read again


@pytest.mark.parametrize(
    "falsified, sentence",
    [
        (lambda uses: uses[1:], "q is missing from linear_q"),
        (lambda uses: [*uses, use("q", "fc1")], "q is in fc1"),
        (lambda uses: uses[:2], "up has rows in fc1 that are missing or come twice"),
        (lambda uses: [uses[0], uses[2]], "up is in fc1 in part"),
        (lambda uses: [*uses, replace(uses[0], crc32=1)], "q was read twice and differed"),
        (lambda uses: [*uses, use("up", "fc1", 1, 2)], "up has rows in fc1 that are missing or come twice"),
    ],
    ids=["dropped", "invented", "first rows missing", "last rows missing", "differs", "rows twice"],
)
def test_a_falsified_account_is_refused(falsified: Callable[[list[Use]], list[Use]], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=f"does not balance: {sentence}; nothing was written"):
        account().close(falsified([use("q", "linear_q"), *UP]))


def test_a_tensor_that_goes_nowhere_or_was_never_there_is_refused() -> None:
    uses = [use("q", "linear_q"), *UP]
    with pytest.raises(CheckpointError, match="spare went nowhere"):
        replace(account(), left_out={}).close(uses)
    with pytest.raises(CheckpointError, match="q was left out and used"):
        replace(account(), left_out={"q": "no", "spare": "no"}).close(uses)
    with pytest.raises(CheckpointError, match="gone is none of the source's"):
        replace(account(), left_out={"spare": "no", "gone": "no"}).close(uses)
