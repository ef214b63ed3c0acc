"""Which class stands behind each projection: megatron-core's or Transformer Engine's, spiking or plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from spikingbrain_train.config.kinds import of_kind
from spikingbrain_train.config.model import SpikingConfig, SpikingProjection
from spikingbrain_train.config.parallel import ParallelLinearBackend
from spikingbrain_train.models.spiking_linear import spiking


def _megatron() -> tuple[type, type]:
    return ColumnParallelLinear, RowParallelLinear


def _transformer_engine() -> tuple[type, type]:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear


_COLUMN_AND_ROW: dict[ParallelLinearBackend, Callable[[], tuple[type, type]]] = {
    ParallelLinearBackend.megatron: _megatron,
    ParallelLinearBackend.transformer_engine: _transformer_engine,
}


@dataclass(frozen=True)
class ParallelLinears:
    """The linear classes of a model, asked for by what they project.

    Where ``model.spiking.projections`` names the projection, the answer is a subclass of the plain class that
    encodes its input as spikes first (:func:`~spikingbrain_train.models.spiking_linear.spiking`).

    Args:
        backend: who provides the classes; resolved, not ``auto``.
        spiking: which projections read spikes, and their k.
    """

    backend: ParallelLinearBackend
    spiking: SpikingConfig = field(default_factory=SpikingConfig)

    def __post_init__(self) -> None:
        assert self.backend is not ParallelLinearBackend.auto, f"unresolved backend {self.backend}"
        self._classes()

    def column(self, projection: SpikingProjection) -> type:
        """A linear whose output is split over tensor-parallel ranks; its input is whole."""
        column, _ = self._classes()
        return self.encoded(projection, column)

    def row(self, projection: SpikingProjection) -> type:
        """A linear whose input is split over tensor-parallel ranks."""
        _, row = self._classes()
        return self.encoded(projection, row, row_parallel=True)

    def _classes(self) -> tuple[type, type]:
        return of_kind(self.backend, _COLUMN_AND_ROW, "the classes of linears")()

    def grouped_column(self, projection: SpikingProjection) -> type:
        """:meth:`column` for all experts of a rank in one grouped GEMM (Transformer Engine only)."""
        assert self.backend is ParallelLinearBackend.transformer_engine, "grouped linears are TE's"
        from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear

        return self.encoded(projection, TEColumnParallelGroupedLinear)

    def grouped_row(self, projection: SpikingProjection) -> type:
        """:meth:`row` for all experts of a rank in one grouped GEMM (Transformer Engine only)."""
        assert self.backend is ParallelLinearBackend.transformer_engine, "grouped linears are TE's"
        from megatron.core.extensions.transformer_engine import TERowParallelGroupedLinear

        return self.encoded(projection, TERowParallelGroupedLinear, row_parallel=True)

    def encoded(
        self, projection: SpikingProjection, linear_class: type, *, row_parallel: bool = False
    ) -> type:
        """``linear_class`` itself, or its spiking subclass if the config asks for spikes there.

        Args:
            projection: what the linear projects.
            linear_class: any module whose ``forward`` takes the input first.
            row_parallel: its input is split over tensor-parallel ranks.
        """
        if projection not in self.spiking.projections:
            return linear_class
        return spiking(linear_class, k=self.spiking.k, row_parallel=row_parallel)
