"""Which ranks of a group lie in one node, and how fast they exchange. Without torch.

Ranks lie as megatron-core's default order has them: tensor-parallel ones are neighbours, around them
context-, then data-parallel ones, pipeline stages farthest apart (``tp-cp-ep-dp-pp``). Expert-parallel ranks
are neighbours among the ranks of a stage. A launcher fills one node after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.config.parallel import ClusterConfig
from spikingbrain_train.errors import ConfigurationError

LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that a large collective reaches. Assumed: NCCL's all-reduce reaches 230 to 240
of the A100's 300 GB/s and about 370 of the H100's 450 inside a node. Latency is left out: messages are
megabytes."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, so many ranks apart."""

    size: int
    stride: int

    def in_a_node(self, gpus_per_node: int) -> int:
        """How many of them lie in one node."""
        return min(self.size, max(1, gpus_per_node // self.stride))


@dataclass(frozen=True)
class Network:
    """The links of a cluster, in bytes a second and direction of one device."""

    gpus_per_node: int
    intra_node: float
    inter_node: float

    @classmethod
    def of(cls, cluster: ClusterConfig) -> Network:
        """The links that a cluster states.

        Raises:
            ConfigurationError: it states none.
        """
        for name in ("intra_node_gb_per_s", "inter_node_gb_per_s"):
            if getattr(cluster, name) is None:
                raise ConfigurationError(
                    f"cluster.{name} is null, so the time of communication is not known; set it, or choose "
                    "cluster=a800, h100, h200 or c550, which state it"
                )
        assert cluster.intra_node_gb_per_s is not None and cluster.inter_node_gb_per_s is not None
        return cls(
            cluster.gpus_per_node,
            cluster.intra_node_gb_per_s * 1e9 * LINK_EFFICIENCY,
            cluster.inter_node_gb_per_s * 1e9 * LINK_EFFICIENCY,
        )

    def ring_seconds(self, group: Group, sent: float) -> float:
        """Of a collective along a ring, for ``sent`` bytes that each rank passes on.

        A ring over several nodes is as fast as its way out of a node. That way has the adapters of all ranks
        of the group that lie in the node, since NCCL lays rings over all of them.
        """
        if group.size == 1:
            return 0.0
        inside = group.in_a_node(self.gpus_per_node)
        if inside == group.size:
            return sent / self.intra_node
        return sent / min(self.intra_node, inside * self.inter_node)

    def all_to_all_seconds(self, group: Group, sent: float) -> float:
        """Of ``sent`` bytes that each rank sends in equal parts to all others; both ways work at once."""
        if group.size == 1:
            return 0.0
        inside = group.in_a_node(self.gpus_per_node)
        outside = (group.size - inside) / (group.size - 1)
        return max(sent * (1 - outside) / self.intra_node, sent * outside / self.inter_node)

    def send_seconds(self, stride: int, sent: float) -> float:
        """Of a message to a rank so many ranks away."""
        return sent / (self.intra_node if stride < self.gpus_per_node else self.inter_node)
