"""The tables by the setting of ``cluster.kernels`` that chooses from each."""

from __future__ import annotations

from typing import Any

from spikingbrain_train.architecture.backends.backend import Backends
from spikingbrain_train.architecture.backends.gated_delta_rule import GATED_DELTA_RULE
from spikingbrain_train.architecture.backends.gated_linear_attention import GATED_LINEAR_ATTENTION
from spikingbrain_train.architecture.backends.linears import EXPERTS, PARALLEL_LINEAR
from spikingbrain_train.architecture.backends.rotary import ROTARY
from spikingbrain_train.architecture.backends.selective_scan import SELECTIVE_SCAN
from spikingbrain_train.architecture.backends.softmax_attention import SOFTMAX_ATTENTION
from spikingbrain_train.architecture.backends.token_permutation import TOKEN_PERMUTATION
from spikingbrain_train.architecture.backends.weight_gradients import WEIGHT_GRADIENTS

TABLES: dict[str, Backends[Any]] = {
    table.setting: table
    for table in (
        *(GATED_LINEAR_ATTENTION, SOFTMAX_ATTENTION, GATED_DELTA_RULE, SELECTIVE_SCAN),
        *(PARALLEL_LINEAR, EXPERTS, WEIGHT_GRADIENTS, TOKEN_PERMUTATION, ROTARY),
    )
}
