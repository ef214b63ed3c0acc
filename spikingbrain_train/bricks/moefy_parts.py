"""What ``spikingbrain-bricks moefy`` writes: a checkpoint whose feed-forwards are cut into experts.

Neurons only change their places: gate and up rows, and columns of the down projection, go to the expert that
they belong to. Whatever else the checkpoint holds is copied. One data file is one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from spikingbrain_train.bricks.routers import Router
from spikingbrain_train.checkpoint.data_files import DataFileWriter, StoredChunk, data_file_name
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.conversion.mapping import Parameter, model_parameters
from spikingbrain_train.conversion.parts import PART_BYTES, Advance, Parts, Record
from spikingbrain_train.conversion.weight_values import fault_of
from spikingbrain_train.errors import CheckpointError


class MoefyParts(Parts):
    """The data files of the result.

    Args:
        reader: the dense checkpoint.
        target: the result's architecture.
        bricks: layer -> [F] int64, the expert of each neuron.
        routers: by layer, float32.
    """

    def __init__(
        self,
        reader: MegatronCheckpointReader,
        target: ModelConfig,
        bricks: Mapping[int, Tensor],
        routers: Mapping[int, Router],
    ) -> None:
        self.reader, self.target = reader, target
        self.bricks, self.routers = dict(bricks), dict(routers)
        self.sizes: list[int] = []
        self.largest_piece = 0
        self.planned: dict[str, int] = {}
        self._parts: list[list[Parameter]] = []
        for parameter in model_parameters(target):
            nbytes = parameter.numel * self._dtype(parameter).itemsize
            if not self._parts or self.sizes[-1] + nbytes > PART_BYTES:
                self._parts.append([])
                self.sizes.append(0)
            self._parts[-1].append(parameter)
            self.sizes[-1] += nbytes
            self.largest_piece = max(self.largest_piece, nbytes)
            self.planned[parameter.name] = parameter.numel

    def write(self, number: int, folder: Path, advance: Advance) -> Record:
        """One data file."""
        chunks: list[StoredChunk] = []
        with DataFileWriter(folder, data_file_name(number)) as file:
            for parameter in self._parts[number]:
                for offset, tensor in self._pieces(parameter):
                    if fault := fault_of(tensor, may_be_zero=True):
                        raise CheckpointError(
                            f"{self.reader.folder}: {parameter.name} would hold values that are no numbers "
                            f"({fault}); cut an earlier checkpoint of the run"
                        )
                    chunks.append(file.write_chunk(parameter.name, parameter.shape, offset, tensor))
                    advance(tensor.nbytes)
        return {
            "files": {file.name: [(each.start, each.length, each.crc32) for each in chunks]},
            "damaged": {},
            "chunks": [asdict(each) for each in chunks],
        }

    def _pieces(self, parameter: Parameter) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Offsets and values: of routed experts one by one, of all else the whole."""
        source = self._source_of(parameter)
        if source is None:
            assert parameter.layer is not None
            router = self.routers[parameter.layer]
            weight = router.weight if parameter.roles == ("router",) else router.hidden
            assert weight is not None
            yield (0, 0), weight.to(self._dtype(parameter)).contiguous()
            return
        whole = self.reader.read(source)
        if not parameter.is_routed:
            rows = parameter.shape[0]  # less the padding of the vocabulary
            yield (0,) * whole.dim(), whole[:rows].contiguous()
            return
        assert parameter.layer is not None
        bricks = self.bricks[parameter.layer]
        is_down = parameter.roles == ("mlp_down_weight",)
        for expert in range(parameter.shape[0]):
            own = (bricks == expert).nonzero().flatten()
            # Gate rows lie above up rows.
            part = whole[:, own] if is_down else torch.cat((whole[own], whole[own + len(bricks)]))
            yield (expert, 0, 0), part.unsqueeze(0).contiguous()

    def _source_of(self, parameter: Parameter) -> str | None:
        """The dense parameter that it is made of; None for routers."""
        if parameter.roles in (("router",), ("router_hidden",)):
            return None
        if parameter.is_routed:
            return parameter.name.replace(".mlp.experts.experts.", ".mlp.")
        return parameter.name

    def _dtype(self, parameter: Parameter) -> torch.dtype:
        source = self._source_of(parameter)
        if source is None:  # as the feed-forward that it routes to
            source = f"decoder.layers.{parameter.layer}.mlp.linear_fc1.weight"
        dtype: torch.dtype = self.reader.tensors[source].properties.dtype
        return dtype
