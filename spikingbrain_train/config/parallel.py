"""How the work is spread over ranks: parallel degrees, sharding, recomputation and platform choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import FREE, SAID, refused, setting

REDUCE_BUCKET = 200_000_000
"""Gradients that DeepSpeed reduces at a time, in elements; the buffer for them is made at once."""

WEIGHTS_STAGE = 3
"""The stage of ZeRO that shards the weights that ranks compute with."""

KEPT_WEIGHTS = 0.75
"""What ranks under ZeRO 3 keep gathered for a module that needs it again, in buckets; the rest of one is
gathered ahead."""

_LONGEST_TIMEOUT = 7 * 24 * 60  # minutes


class Recompute(str, Enum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"
    """Keep everything: fastest, most memory."""
    moe_activation = "moe_activation"
    """Compute the router and the experts' activation function again (SpikingBrain, arXiv 2509.05276, section
    4.1, level 1). With spikes in front of mlp_fc2 only the router: the spikes are kept."""
    moe_feed_forward = "moe_feed_forward"
    """Also compute the feed-forwards again: those of experts and shared experts (level 2), and, which the
    report does not say, those of the model's dense layers."""
    moe_layer = "moe_layer"
    """Compute whole mixture-of-experts layers again, communication included (level 3), and dense
    feed-forwards."""
    full = "full"
    """Keep only each layer's input: about a third more work, least memory."""


class LinearAttentionContextParallel(str, Enum):
    """How recurrences (gated linear attention, delta rule) know what lies on the ranks before."""

    allgather = "allgather"
    """All ranks gather every rank's state and transition, then each combines those before it (LASP-2)."""
    allscan = "allscan"
    """The running state is passed from neighbour to neighbour in blocks (ZeCO), while local work of gated
    linear attention goes on."""
    ulysses = "ulysses"
    """All-to-all: every rank takes the whole sequence of a share of the heads."""


class SlidingWindowContextParallel(str, Enum):
    """How sliding-window attention sees keys of other context-parallel ranks."""

    halo = "halo"
    """The ranks before send the keys and values that the window reaches."""
    ulysses = "ulysses"
    """All-to-all: every rank takes the whole sequence of a share of the heads."""


@dataclass
class ContextParallelConfig:
    """How mixers work on a sequence that is split over ranks. Full attention always uses Ulysses."""

    gated_linear_attention: LinearAttentionContextParallel = setting(
        LinearAttentionContextParallel.allgather, resume=SAID
    )
    """How linear attention, and the gated delta rule, learn what lies on the ranks before."""
    sliding_window_attention: SlidingWindowContextParallel = setting(
        SlidingWindowContextParallel.halo, resume=SAID
    )
    """How sliding windows see keys of the ranks before."""
    head_padding: bool = setting(True, resume=FREE)
    """Let Ulysses take heads that do not divide over the ranks: ranks get unequal shares, and one that would
    have none is padded with a head of zeros. false refuses such layouts."""


class EngineKind(str, Enum):
    """Who reduces gradients, shards state and updates weights."""

    megatron = "megatron"
    """megatron-core's data parallelism and optimizer: every topology."""
    deepspeed = "deepspeed"
    """DeepSpeed's ZeRO over data- and context-parallel ranks; see docs/engines.md."""
    fsdp = "fsdp"
    """torch's FSDP2 over data- and context-parallel ranks, also beside tensor parallelism."""


@dataclass
class FsdpConfig:
    """torch's fully sharded data parallelism (FSDP2); read by parallel.engine=fsdp."""

    reshard_after_forward: bool = setting(True, resume=FREE)
    """Free a layer's gathered weights behind its forward pass and gather them again for its backward pass, as
    ZeRO 3 does. false keeps them from one to the other: ranks gather half as much, and hold all weights."""


@dataclass
class ZeroConfig:
    """DeepSpeed's ZeRO (arXiv 1910.02054); read by parallel.engine=deepspeed."""

    stage: int = setting(2, minimum=1, maximum=WEIGHTS_STAGE, resume=SAID)
    """What every rank holds a share of only: 1 optimizer state and fp32 weights, 2 gradients, too, 3 also the
    weights that it computes with, which ranks gather layer by layer."""
    offload_optimizer: bool = setting(False, resume=SAID)
    """Keep that share of the optimizer state and of the fp32 weights in host memory, and update there."""


@dataclass
class ParallelConfig:
    """Parallel degrees. Data parallelism takes what tensor x pipeline x context leave of the world."""

    tensor_model_parallel_size: int = setting(1, minimum=1, resume=SAID)
    """Ranks over which heads, feed-forward columns and the vocabulary are split."""
    pipeline_model_parallel_size: int = setting(1, minimum=1, resume=SAID)
    """Pipeline stages, each with as many layers as the others unless pipeline_model_parallel_layout says
    otherwise."""
    pipeline_model_parallel_layout: list[int] | None = setting(None, minimum=1, resume=SAID)
    """Layers of each pipeline stage, the first one's first, e.g. [6,8,8,6] for 28: the first stage has the
    embedding besides, the last one the vocabulary projection and the loss. With virtual stages layers of each
    of those, in the order of the model. Null spreads layers evenly."""
    virtual_pipeline_model_parallel_size: int | None = setting(None, minimum=2, resume=SAID)
    """Virtual stages of every pipeline rank (interleaved 1F1B, arXiv 2104.04473, section 2.2): the model is
    cut into so many times as many stages as there are ranks, and each rank takes every
    pipeline_model_parallel_size-th of them. The pipeline's bubble shrinks by this factor; ranks send so many
    times as much to each other and keep more activations. The micro-batches of a step must be a multiple of
    pipeline_model_parallel_size. Null: one stage a rank."""
    context_parallel_size: int = setting(1, minimum=1, resume=SAID)
    """Ranks over which every sequence is split in contiguous slices."""
    expert_model_parallel_size: int = setting(1, minimum=1, resume=SAID)
    """Ranks over which the routed experts are spread; taken from the data- and context-parallel ranks."""
    expert_tensor_parallel_size: int | None = setting(None, minimum=1, resume=SAID)
    """Ranks over which every routed expert is split; null takes tensor_model_parallel_size."""
    replicate_expert_load: float | None = setting(None, minimum=1, resume=FREE)
    """An expert that gets more tokens of a micro-batch than this times the mean of the experts is copied to
    all expert-parallel ranks for it, each of which computes its own tokens, so that the load of ranks evens
    out (SpikingBrain, arXiv 2509.05276, section 4.1). Null copies none."""
    context_parallel: ContextParallelConfig = field(default_factory=ContextParallelConfig)
    """Communication of each kind of mixer under context parallelism."""
    sequence_parallel: bool = setting(False, resume=SAID)
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    data_parallel_size: int | None = setting(None, minimum=1, resume=SAID)
    """Expected replicas. Null takes world size / (tensor x pipeline x context); a number is checked against
    it."""
    engine: EngineKind = setting(EngineKind.megatron, resume=SAID)
    """Who reduces gradients, shards state and updates weights. A run may go on with another one."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """What engine=deepspeed shards, and where it keeps it."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    """How long engine=fsdp keeps what it gathers."""
    use_distributed_optimizer: bool = setting(False, resume=refused("its optimizer state has another form"))
    """Shard optimizer state and fp32 main weights over data-parallel ranks. Gradients are reduce-scattered,
    but every rank keeps the whole fp32 buffer of them: ZeRO-1 in memory, not ZeRO-2. With engine=deepspeed or
    fsdp, which shard anyway, it says only which of megatron-core's two forms checkpoints have."""
    overlap_grad_reduce: bool = setting(False, resume=FREE)
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = setting(False, resume=FREE)
    """Gather updated weights while the next forward pass already runs; needs use_distributed_optimizer."""
    recompute: Recompute = setting(Recompute.none, resume=FREE)
    """Which activations are computed again in the backward pass instead of being kept: more work, less
    memory."""
    recompute_expert_tokens: int | None = setting(None, minimum=1, resume=FREE)
    """An expert that gets more tokens than this of one micro-batch, from all ranks that send to it, keeps its
    input alone and computes the rest again, whatever its neighbours do (SpikingBrain, arXiv 2509.05276,
    section 4.1): what experts keep of an unbalanced step has a bound. Null: only what `recompute` says."""

    def check(self, prefix: str) -> None:
        """What splits or overlaps something has that something. Raises ConfigurationError."""
        require(
            not (self.sequence_parallel and self.tensor_model_parallel_size == 1),
            f"{prefix}sequence_parallel=true splits the sequence over tensor-parallel ranks, but "
            f"{prefix}tensor_model_parallel_size is 1; set it to false, or the tensor degree to 2 or more",
        )
        require(
            self.virtual_pipeline_model_parallel_size is None or self.pipeline_model_parallel_size > 1,
            f"{prefix}virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size} gives "
            f"each pipeline rank several stages, but {prefix}pipeline_model_parallel_size is 1; set it to "
            "null, or the pipeline degree to 2 or more",
        )
        if self.replicate_expert_load is not None:
            copies = f"{prefix}replicate_expert_load={self.replicate_expert_load:g} copies experts"
            require(
                self.expert_model_parallel_size > 1,
                f"{copies} to expert-parallel ranks, but {prefix}expert_model_parallel_size is 1; set it to "
                f"null, or the degree to 2 or more",
            )
            require(
                self.expert_tensor_size == 1,
                f"{copies} that are whole, but expert tensor parallelism splits each over "
                f"{self.expert_tensor_size} ranks; set {prefix}expert_tensor_parallel_size=1, or it to null",
            )
            require(
                not self.overlap_param_gather,
                f"{copies} ahead of the layer that {prefix}overlap_param_gather=true gathers weights for; "
                f"set the latter to false, or the former to null",
            )
        # Other engines gather in ways of their own, and planning/engine_checks.py says so.
        gathers_ahead = self.overlap_param_gather and self.engine is EngineKind.megatron
        for needed in ("use_distributed_optimizer", "overlap_grad_reduce"):
            require(
                getattr(self, needed) or not gathers_ahead,
                f"{prefix}overlap_param_gather=true needs {prefix}{needed}=true",
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on one sequence: tensor x pipeline x context."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def virtual_stages(self) -> int:
        """Stages of the model on every pipeline rank."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def most_expert_tokens(self) -> int | None:
        """Tokens of an expert that keeps its activations; None where ``recompute`` alone says which do."""
        levels = (Recompute.none, Recompute.moe_activation)
        return self.recompute_expert_tokens if self.recompute in levels else None

    @property
    def expert_tensor_size(self) -> int:
        """Ranks over which every routed expert is split."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size


class AcceleratorKind(str, Enum):
    """The platform a run asks for."""

    auto = "auto"
    """A GPU if there is one, else the CPU."""
    cuda = "cuda"
    """NVIDIA GPUs over NCCL."""
    metax = "metax"
    """MetaX GPUs over MCCL."""
    cpu = "cpu"
    """CPU ranks over gloo."""


class LinearAttentionBackend(str, Enum):
    """Kernels of gated linear attention and of the gated delta rule."""

    auto = "auto"
    """flash-linear-attention on GPUs where it is installed, else chunk."""
    fla = "fla"
    """flash-linear-attention's Triton kernels (GPU)."""
    chunk = "chunk"
    """This project's chunked form in plain PyTorch."""
    naive = "naive"
    """The recurrence token by token: exact, slow, easy to check against the paper."""


class SoftmaxAttentionBackend(str, Enum):
    """Kernels of full and sliding-window attention."""

    auto = "auto"
    """flash-attn where it can compute a call, else flex attention or SDPA on GPUs; blocked on CPU."""
    flash_attn = "flash_attn"
    """The flash-attn package (GPU)."""
    flex = "flex"
    """torch's compiled flex attention (GPU with Triton)."""
    sdpa = "sdpa"
    """torch's scaled_dot_product_attention over the whole sequence; a finite window costs a T x T mask."""
    blocked = "blocked"
    """This project's blocked form: O(T x window) work, no T x T mask."""
    naive = "naive"
    """Masked softmax written out: exact, slow, easy to check against the paper."""


class SelectiveScanBackend(str, Enum):
    """Kernels of Mamba's selective scan."""

    auto = "auto"
    """mamba_ssm on GPUs where it is installed and no state is handed over, else chunk."""
    mamba_ssm = "mamba_ssm"
    """The kernel of the package mamba-ssm (CUDA)."""
    chunk = "chunk"
    """This project's chunked form in plain PyTorch."""
    naive = "naive"
    """The recurrence token by token: exact, slow, easy to check against the paper."""


class ParallelLinearBackend(str, Enum):
    """Who provides the parallel linear layers."""

    auto = "auto"
    """Transformer Engine on GPUs where it is installed, else megatron."""
    transformer_engine = "transformer_engine"
    """Transformer Engine's parallel linears (GPU)."""
    megatron = "megatron"
    """megatron-core's own parallel linears."""


class ExpertBackend(str, Enum):
    """Who multiplies the routed experts of a mixture-of-experts layer."""

    auto = "auto"
    """transformer_engine where parallel_linear is, else grouped_gemm where it can, else sequential."""
    transformer_engine = "transformer_engine"
    """One grouped GEMM of Transformer Engine for all experts of a rank; needs its parallel linears."""
    grouped_gemm = "grouped_gemm"
    """One grouped GEMM of the package grouped_gemm: on GPUs, in bf16, with megatron-core 0.16, without spikes
    inside experts."""
    sequential = "sequential"
    """One expert after the other, with the classes of parallel_linear."""


class WeightGradientBackend(str, Enum):
    """Who adds the weight gradients of linears to those of earlier micro-batches."""

    auto = "auto"
    """The library of parallel_linear where it can, else autograd."""
    transformer_engine = "transformer_engine"
    """Transformer Engine's linears, within the product (GPU); needs them as parallel_linear."""
    apex = "apex"
    """Apex's kernel, within the product of megatron-core's linears (GPU)."""
    autograd = "autograd"
    """A product in the precision of the weights, and an addition behind it."""


class TokenPermutationBackend(str, Enum):
    """Who sorts the tokens of a mixture-of-experts layer by their experts, and back."""

    auto = "auto"
    """Transformer Engine on GPUs where it is installed, else megatron."""
    transformer_engine = "transformer_engine"
    """Transformer Engine's kernels (GPU), which the CPU does not wait for."""
    megatron = "megatron"
    """megatron-core's operations of torch."""


class RotaryBackend(str, Enum):
    """Who turns queries and keys by their positions."""

    auto = "auto"
    """Transformer Engine on GPUs where it is installed and all rows of a batch have the same positions, else
    megatron."""
    transformer_engine = "transformer_engine"
    """Transformer Engine's kernel (GPU): one pass, angles in float32."""
    megatron = "megatron"
    """megatron-core's operations of torch, with sines and cosines in the precision of the run."""


@dataclass
class KernelConfig:
    """Which library does the heavy work.

    ``auto`` takes the best that is here and can do it, call by call for attention, and logs it; a name that
    is missing or cannot do it is an error.
    """

    gated_linear_attention: LinearAttentionBackend = setting(LinearAttentionBackend.auto, resume=SAID)
    """Who computes gated linear attention."""
    softmax_attention: SoftmaxAttentionBackend = setting(SoftmaxAttentionBackend.auto, resume=SAID)
    """Who computes full and sliding-window attention."""
    gated_delta_rule: LinearAttentionBackend = setting(LinearAttentionBackend.auto, resume=SAID)
    """Who computes the gated delta rule."""
    parallel_linear: ParallelLinearBackend = setting(ParallelLinearBackend.auto, resume=SAID)
    """Who provides the projections that tensor-parallel ranks split."""
    experts: ExpertBackend = setting(ExpertBackend.auto, resume=SAID)
    """Who multiplies the routed experts."""
    selective_scan: SelectiveScanBackend = setting(SelectiveScanBackend.auto, resume=SAID)
    """Who computes Mamba's selective scan."""
    weight_gradients: WeightGradientBackend = setting(WeightGradientBackend.auto, resume=SAID)
    """Who adds weight gradients of linears up over micro-batches, in float32. Within the product none in bf16
    is written and rounded. Linears whose weight is transformed, or is read elsewhere, too, leave it to
    autograd."""
    token_permutation: TokenPermutationBackend = setting(TokenPermutationBackend.auto, resume=SAID)
    """Who sorts tokens by the experts that they are routed to."""
    rotary: RotaryBackend = setting(RotaryBackend.auto, resume=SAID)
    """Who turns queries and keys by rotary positions."""


@dataclass
class ClusterConfig:
    """The machines a run is on."""

    accelerator: AcceleratorKind = setting(AcceleratorKind.auto, resume=SAID)
    """What ranks compute on."""
    timeout_minutes: float = setting(10.0, above=0, resume=FREE)
    """Minutes after which a collective that still waits fails the run, instead of hanging it."""
    exit_duration_in_mins: float | None = setting(None, above=0, resume=FREE)
    """Minutes from the start of its processes on after which a run finishes its step, saves, and ends with
    code 75, to be started again; null is no such limit."""
    exit_before_job_end_in_mins: float | None = setting(5.0, minimum=0, resume=FREE)
    """The same so many minutes ahead of the end of a Slurm job, of which SLURM_JOB_END_TIME tells; null
    leaves that aside."""
    slow_rank_factor: float | None = setting(1.2, above=1, resume=FREE)
    """How many times as long as its peers a rank has to compute, waiting for others aside, to be named in a
    warning. Null times no ranks, and leaves their metrics out."""
    memory_gib: float | None = setting(None, above=0, resume=FREE)
    """Memory of one device in GiB, as its driver shows it. A plan says whether every rank fits into it; null
    leaves that open in a plan, and a run asks its GPU."""
    peak_tflops: float | None = setting(None, above=0, resume=FREE)
    """Peak TFLOP/s of one rank for MFU, in the precision of the run and without sparsity. Null takes what
    a GPU is sold for in bf16 or measures a matrix product at start-up, and leaves a plan without hours."""
    fp8_peak_tflops: float | None = setting(None, minimum=0, resume=FREE)
    """Peak TFLOP/s of one rank for products of FP8 numbers, without sparsity; 0 says that its GPUs have none.
    Read by plans of runs with fp8.format alone: MFU stays relative to peak_tflops."""
    compute_capability: float | None = setting(None, above=0, maximum=20, resume=FREE)
    """Of its NVIDIA GPUs: 9.0 is Hopper. Read with fp8.format, some of whose recipes need newer GPUs; null
    leaves that to the start of a run, which asks its GPU."""
    gpus_per_node: int = setting(8, minimum=1, resume=FREE)
    """Devices of a node, for the search of a layout: ranks that lie in one node exchange over
    intra_node_gb_per_s."""
    intra_node_gb_per_s: float | None = setting(None, above=0, resume=FREE)
    """What a device can send to the others of its node, in gigabytes (1e9 bytes) a second and direction, for
    the search of a layout; null leaves its communication unknown."""
    inter_node_gb_per_s: float | None = setting(None, above=0, resume=FREE)
    """A device's share of what its node can send to others, in gigabytes (1e9 bytes) a second and direction,
    for the search of a layout."""
    mfu: float | None = setting(None, above=0, maximum=1, resume=FREE)
    """Model FLOP/s utilisation (0 to 1) at which a plan reckons hours. Pipeline bubble, recomputation and
    communication are in it. Null takes what was measured (cluster.measured_in), else what SpikingBrain's
    report gives, and the plan says which."""
    measured_in: str | None = setting(None, resume=FREE)
    """Output folder of an earlier run, whose measured speed (train/tflops) a plan reckons hours with. Null
    takes this run's own output_dir, where it has measured something."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    """Libraries for attention and projections."""

    def check(self, prefix: str) -> None:
        """A run that hangs fails within days, and hours have one source. Raises ConfigurationError."""
        require(
            self.mfu is None or self.measured_in is None,
            f"{prefix}mfu={self.mfu} and {prefix}measured_in={self.measured_in} both say how fast a run is; "
            f"set one of them to null",
        )
        require(
            self.timeout_minutes <= _LONGEST_TIMEOUT,
            f"{prefix}timeout_minutes={self.timeout_minutes} must be at most {_LONGEST_TIMEOUT}, a week",
        )
