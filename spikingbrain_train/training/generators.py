"""The random generators of a rank, as they are at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from spikingbrain_train.parallel.process_groups import ProcessGroups


@dataclass(frozen=True)
class Generators:
    """Their states; taking them makes no host wait for its device."""

    torch: dict[str, Tensor]
    tracker: dict[str, Tensor]

    @classmethod
    def of(cls, groups: ProcessGroups) -> Generators:
        """Those of this rank, now."""
        return cls(groups.accelerator.get_rng_state(), dict(get_cuda_rng_tracker().get_states()))

    def restore(self, groups: ProcessGroups) -> None:
        """Have this rank draw the same numbers once more."""
        groups.accelerator.set_rng_state(self.torch)
        get_cuda_rng_tracker().set_states(dict(self.tracker))
