"""Distributed training for SpikingBrain-style hybrid linear-attention language models."""

from spikingbrain_train.runtime.megatron_jit import leave_fusions_uncompiled
from spikingbrain_train.runtime.megatron_loggers import leave_loggers_unimported
from spikingbrain_train.runtime.quiet_torch import drop_cuda_notice

__version__ = "0.1.0"

# Here, because every process imports this file before megatron-core: commands, ranks, spawned writers.
drop_cuda_notice()
leave_fusions_uncompiled()
leave_loggers_unimported()
