"""One number format for all ranks of a run."""

from __future__ import annotations

import torch

from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.planning.fp8_checks import check_precision_of_fp8
from spikingbrain_train.planning.precision import PrecisionChoice, expected_precision, settled_precision
from spikingbrain_train.runtime.bf16 import choose_precision


def agreed_choice(groups: ProcessGroups) -> PrecisionChoice:
    """What the hardware of all ranks takes: fp32 if one of them lacks fast bf16."""
    choice = choose_precision(groups.accelerator)
    lacking = torch.tensor(int(choice.precision is Precision.fp32), device=groups.device)
    torch.distributed.all_reduce(lacking)
    if 0 < lacking.item() < groups.world_size:
        ranks = f"because {lacking.item()} of {groups.world_size} ranks have no fast bf16"
        choice = PrecisionChoice(Precision.fp32, ranks)
    return choice


def agree_on_precision(config: RunConfig, groups: ProcessGroups) -> PrecisionChoice:
    """What ``config.precision`` is in this run, the same on every rank: fp32 if one of them lacks fast bf16.

    Raises:
        CheckpointError: a checkpoint of this run is damaged.
        ConfigurationError: the run multiplies in FP8, which stands beside bf16, and a rank lacks that.
    """
    choice = _agreed_or_settled(config, groups)
    check_precision_of_fp8(config, choice)
    return choice


def _agreed_or_settled(config: RunConfig, groups: ProcessGroups) -> PrecisionChoice:
    settled = settled_precision(config)
    if settled is not None:
        return settled
    choice = agreed_choice(groups)
    expected = expected_precision(config)
    if expected.precision is choice.precision:
        return choice
    return PrecisionChoice(
        choice.precision, f"{choice.reason} (not {expected.precision.value}, as the plan expected)"
    )
