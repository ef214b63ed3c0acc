"""How the work is spread over ranks: parallel degrees, sharding, recomputation and platform choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Recompute(str, Enum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    """Keep everything: fastest, most memory."""
    full = "full"
    """Keep only each layer's input: about a third more work, least memory."""


@dataclass
class ParallelConfig:
    """Parallel degrees. data parallelism takes what tensor x pipeline leave of the world."""

    tensor_model_parallel_size: int = 1
    """Ranks over which heads, feed-forward columns and the vocabulary are split."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages; num_layers must be divisible by it."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    data_parallel_size: int | None = None
    """Expected replicas. Null takes world size / (tensor x pipeline); a number is checked against that."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and fp32 main weights over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass already runs; needs use_distributed_optimizer."""
    recompute: Recompute = Recompute.none
    """Activation recomputation."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size


class AcceleratorKind(str, Enum):
    """The platform a run asks for."""

    auto = "auto"
    cuda = "cuda"
    metax = "metax"
    cpu = "cpu"


class LinearAttentionBackend(str, Enum):
    """Kernels of gated linear attention."""

    auto = "auto"
    """flash-linear-attention on GPUs where it is installed, else chunk."""
    fla = "fla"
    """flash-linear-attention's Triton kernels (GPU)."""
    chunk = "chunk"
    """This project's chunked form in plain PyTorch."""
    recurrent = "recurrent"
    """The token-by-token reference: exact and slow."""


class SoftmaxAttentionBackend(str, Enum):
    """Kernels of full and sliding-window attention."""

    auto = "auto"
    """flash-attn, else flex attention or SDPA on GPUs; blocked on CPU."""
    flash_attn = "flash_attn"
    """The flash-attn package (GPU)."""
    flex = "flex"
    """torch's compiled flex attention (GPU)."""
    sdpa = "sdpa"
    """torch's scaled_dot_product_attention over the whole sequence; a finite window costs a T x T mask."""
    blocked = "blocked"
    """This project's blocked form: O(T x window) work, no T x T mask."""
    reference = "reference"
    """Masked softmax written out: exact and slow."""


class ParallelLinearBackend(str, Enum):
    """Who provides the parallel linear layers."""

    auto = "auto"
    """Transformer Engine on GPUs where it is installed, else megatron."""
    transformer_engine = "transformer_engine"
    """Transformer Engine's parallel linears (GPU)."""
    megatron = "megatron"
    """megatron-core's own parallel linears."""


@dataclass
class KernelConfig:
    """Which library does the heavy work. ``auto`` falls back and logs it; a missing name is an error."""

    gated_linear_attention: LinearAttentionBackend = LinearAttentionBackend.auto
    """Backend of GLA layers."""
    softmax_attention: SoftmaxAttentionBackend = SoftmaxAttentionBackend.auto
    """Backend of full and sliding-window layers."""
    parallel_linear: ParallelLinearBackend = ParallelLinearBackend.auto
    """Backend of the projections."""


@dataclass
class ClusterConfig:
    """The machines a run is on."""

    accelerator: AcceleratorKind = AcceleratorKind.auto
    """Platform: cuda, metax, cpu, or auto (a GPU if there is one)."""
    timeout_minutes: float = 10.0
    """A collective that waits longer than this fails the run instead of hanging it."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one rank for MFU. Null measures a matrix product at start-up."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    """Libraries for attention and projections."""
