"""Unsupported versions of megatron-core are refused, and what it announces is not repeated."""

from __future__ import annotations

import logging

import pytest
from packaging.version import Version

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.runtime import megatron_versions
from spikingbrain_train.runtime.quiet_torch import silence_deprecation_notices


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0", "0.19.2"])
def test_supported_versions_pass(version: str) -> None:
    megatron_versions.check_version(Version(version))


@pytest.mark.parametrize("version", ["0.12.0", "0.16.0", "0.20.0", "1.0"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(PlatformError, match=f"megatron-core {version} is not supported; install"):
        megatron_versions.check_version(Version(version))


def test_deprecation_notices_are_dropped_and_other_messages_kept(caplog: pytest.LogCaptureFixture) -> None:
    silence_deprecation_notices()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    with caplog.at_level(logging.WARNING):
        logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting ...")
        logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]
