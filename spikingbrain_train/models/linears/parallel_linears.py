"""Which class stands behind each projection: megatron-core's or Transformer Engine's, and what it does.

Releases of Transformer Engine that megatron-core's calls were held to: architecture/backends/releases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from spikingbrain_train.architecture.fp8 import FP8_PROJECTIONS
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS, transforms_of
from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.config.fp8 import Fp8Config
from spikingbrain_train.config.import_path import object_of_kind
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelLinearBackend
from spikingbrain_train.models.linears.fp8 import in_fp8
from spikingbrain_train.models.linears.joined_rows import RowsOf, rows_of_projection
from spikingbrain_train.models.linears.linear_transform import LinearTransform
from spikingbrain_train.models.linears.sub_norm import with_sub_norm
from spikingbrain_train.models.linears.transformed_linear import transformed


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

    Where the model transforms inputs or weights of the projection, the answer is a subclass of the plain
    class that does (:func:`~spikingbrain_train.models.linears.transformed_linear.transformed`).

    Args:
        backend: who provides the classes; resolved, not ``auto``.
        model: says which transforms are applied to which projections; None has plain linears.
        fp8: number formats and scales of products (architecture/fp8.py); None: the format of the weights.
    """

    backend: ParallelLinearBackend
    model: ModelConfig | None = None
    fp8: Fp8Config | None = None
    _made: dict[Any, type] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.backend is not ParallelLinearBackend.auto, f"unresolved backend {self.backend}"
        self._classes(Projection.qkv)

    def column(
        self,
        projection: Projection,
        *,
        bias: bool = False,
        rows_of: RowsOf | None = None,
        roles: tuple[str, ...] = (),
    ) -> type:
        """A linear whose output is split over tensor-parallel ranks; its input is whole.

        With ``bias`` it has and adds one, whatever megatron-core's ``add_bias_linear`` says of all linears.
        ``rows_of`` and ``roles`` are :meth:`transformed`'s.
        """
        column, _ = self._classes(projection)
        column = self._biased(column) if bias else column
        return self.transformed(projection, column, weight_split_axis=0, rows_of=rows_of, roles=roles)

    def row(
        self,
        projection: Projection,
        *,
        bias: bool = False,
        sub_norm: bool = False,
        roles: tuple[str, ...] = (),
    ) -> type:
        """A linear whose input is split over tensor-parallel ranks.

        ``bias`` and ``roles`` as for :meth:`column`. With ``sub_norm`` it reads its input through an RMSNorm
        of its own.
        """
        _, row = self._classes(projection)
        row = self._biased(row) if bias else row
        row = self.transformed(projection, row, row_parallel=True, weight_split_axis=1, roles=roles)
        if sub_norm:
            key = ("sub_norm", row)
            if key not in self._made:
                self._made[key] = with_sub_norm(row)
            row = self._made[key]
        return row

    def _biased(self, linear_class: Any) -> type:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            linear_class.__init__(self, *args, **kwargs | {"bias": True, "skip_bias_add": False})

        if linear_class not in self._made:
            self._made[linear_class] = type(linear_class.__name__, (linear_class,), {"__init__": __init__})
        return self._made[linear_class]

    def _holding(
        self, holder: str, linear_class: type, projection: Projection, split_axis: int | None
    ) -> type:
        key = (holder, linear_class, projection)
        if key not in self._made:
            make = object_of_kind(holder, "what linears hold")
            self._made[key] = make(linear_class, self.model, projection, split_axis)
        return self._made[key]

    def _classes(self, projection: Projection) -> tuple[type, type]:
        column, row = entry_of(self.backend, _COLUMN_AND_ROW, "the classes of linears")()
        return self._multiplying(projection, column), self._multiplying(projection, row)

    def _multiplying(self, projection: Projection, linear_class: type) -> type:
        """The class itself, or what multiplies in FP8 in its place."""
        if self.fp8 is None or projection not in FP8_PROJECTIONS:
            return linear_class
        return in_fp8(linear_class, self.fp8, self.backend)

    def grouped_column(self, projection: Projection) -> type:
        """:meth:`column` for all experts of a rank in one grouped GEMM (Transformer Engine only)."""
        assert self.backend is ParallelLinearBackend.transformer_engine, "grouped linears are TE's"
        from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear

        linear_class = self._multiplying(projection, TEColumnParallelGroupedLinear)
        return self.transformed(projection, linear_class, weight_split_axis=0)

    def grouped_row(self, projection: Projection) -> type:
        """:meth:`row` for all experts of a rank in one grouped GEMM (Transformer Engine only)."""
        assert self.backend is ParallelLinearBackend.transformer_engine, "grouped linears are TE's"
        from megatron.core.extensions.transformer_engine import TERowParallelGroupedLinear

        linear_class = self._multiplying(projection, TERowParallelGroupedLinear)
        return self.transformed(projection, linear_class, row_parallel=True, weight_split_axis=1)

    def transformed(
        self,
        projection: Projection,
        linear_class: type,
        *,
        row_parallel: bool = False,
        weight_split_axis: int | None = None,
        matrix: int = 0,
        rows_of: RowsOf | None = None,
        roles: tuple[str, ...] = (),
    ) -> type:
        """``linear_class`` itself, or its subclass that applies what the model asks for there.

        Args:
            projection: what the linear projects.
            linear_class: as :func:`~spikingbrain_train.models.linears.transformed_linear.transformed` has it.
            row_parallel: its input is split over tensor-parallel ranks.
            weight_split_axis: the axis of its weight that is; None where every rank holds all of it.
            matrix: its position where several linears, one behind the other, make up the projection.
            rows_of: the matrices whose rows lie in its weight; None has megatron-core's q, k and v, and gate
                and up projection.
            roles: what the matrices in its weight are, as the description of the weight has them; () are
                those of attention and feed-forwards.
        """
        model = self.model
        if model is None:
            return linear_class
        for kind in LINEAR_TRANSFORMS:
            if (holder := kind.holder(model)) is not None:
                linear_class = self._holding(holder, linear_class, projection, weight_split_axis)
        kinds = [kind for kind in transforms_of(model) if kind.applies(model, projection, matrix)]
        if not kinds:
            return linear_class

        def transforms() -> dict[str, LinearTransform]:
            return {
                kind.name: object_of_kind(kind.transform, f"linear transform {kind.name}")(model)
                for kind in kinds
            }

        rows_of = rows_of or rows_of_projection(projection)
        key = (
            linear_class,
            projection,
            rows_of,
            roles,
            row_parallel,
            weight_split_axis,
            *(kind.name for kind in kinds),
        )
        if key not in self._made:
            self._made[key] = transformed(
                linear_class,
                transforms,
                rows_of=rows_of,
                row_parallel=row_parallel,
                weight_split_axis=weight_split_axis,
                projection=projection,
                roles=roles,
                in_front=frozenset(kind.name for kind in kinds if kind.in_front),
            )
        return self._made[key]
