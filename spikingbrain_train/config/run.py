"""What one run is: everything that `spikingbrain-train` needs, stored beside every checkpoint it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

from omegaconf import MISSING

from spikingbrain_train.config.blend import check_blend, prefixes_of, weights_of
from spikingbrain_train.config.fp8 import Fp8Config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.named_class import named_classes
from spikingbrain_train.config.numerics import NumericsConfig
from spikingbrain_train.config.parallel import ClusterConfig, ParallelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import (
    BY_TOKENS,
    FREE,
    OTHER_ORDER,
    SAID,
    refused,
    said,
    setting,
)
from spikingbrain_train.config.shown import shown
from spikingbrain_train.config.stage import StageConfig

_BETA = "be at least 0 and below 1, e.g. 0.95"


class Precision(str, Enum):
    """Number format of weights and activations; the optimizer always keeps fp32 main weights."""

    auto = "auto"
    """bf16 where the hardware multiplies it, else fp32: decided once for all ranks, and kept on resume. The
    log of a run and its stored run_config.yaml name what it became."""
    fp32 = "fp32"
    """32 bits throughout: twice the memory; the faster one on CPUs without bf16 instructions."""
    bf16 = "bf16"
    """Weights and activations in bfloat16, main weights and optimizer state in fp32."""


@dataclass
class LongDocumentsConfig:
    """Preferring documents that are long by nature.

    Packed short ones teach little about long context (SpikingBrain, arXiv 2509.05276, section 6).
    """

    share: float | None = setting(None, minimum=0, maximum=1, resume=refused(OTHER_ORDER))
    """Off where null. Else documents longer than a sample are cut into samples of their own first, and only
    rests and shorter ones are packed; and where fewer than this share of a domain's samples come of long
    documents, these are read more often and the others less. So each domain keeps its part of the whole, as
    per-source upsampling has it (arXiv 2402.10171). 0 reads all alike."""
    min_tokens: int | None = setting(None, minimum=1, resume=refused(OTHER_ORDER))
    """Tokens from which on a document is long. Null, or more than stage.seq_length, takes those longer than a
    sample, which few documents of web text are; the length of the stage before is a gentler choice."""
    max_repeats: float = setting(4.0, minimum=1, resume=refused(OTHER_ORDER))
    """How often long documents are read at most while the dataset is read once; up to about 4 times are as
    good as fresh text (arXiv 2305.16264)."""


@dataclass
class DataConfig:
    """The tokens.

    Each file is looked at once for ids beyond the model's vocabulary; ``<prefix>.checked``, or
    ``checked_data.json`` in output_dir, remembers it.
    """

    train: list[Any] = setting(default_factory=list, resume=BY_TOKENS)
    """Prefixes of indexed datasets (the path without .bin/.idx) made by spikingbrain-preprocess; several are
    blended by their size, or by weights above 0 whose sum does not matter, as in
    [{prefix: a, weight: 0.7}, {prefix: b, weight: 0.3}]."""
    valid: list[str] = setting(default_factory=list, resume=SAID)
    """Prefixes of held-out datasets for evaluation; empty skips evaluation."""
    tokenizer: str | None = setting(None, resume=SAID)
    """Hugging Face tokenizer folder or sentencepiece .model. Null takes the checkpoint's own."""
    source_tokens: float | None = setting(None, above=0, resume=SAID)
    """Tokens that the dense source was trained on, e.g. 18e12 for Qwen2.5 (arXiv 2412.15115): the run says
    which share of them all stages together have read. Null takes what the stage before was told."""
    reset_at_documents: bool = setting(False, resume=SAID)
    """Keep the documents packed into one sequence apart: attention is masked and linear attention's state
    starts anew at their boundaries, and positions restart."""
    pack_by_domain: bool = setting(False, resume=refused(OTHER_ORDER))
    """Fill every training sample with documents of one domain, as spikingbrain-preprocess --domain-key or
    --domain-from has stored it; a dataset without domains is one. SpikingBrain's long samples are packed so
    (arXiv 2509.05276, section 3.4)."""
    long_documents: LongDocumentsConfig = field(default_factory=LongDocumentsConfig)
    """Preferring naturally long documents in training samples."""
    num_workers: int = setting(0, minimum=0, resume=FREE)
    """Loader processes per rank; 0 reads in the training process, which is enough but for long sequences."""

    @property
    def train_prefixes(self) -> list[str]:
        """The prefixes of :attr:`train`."""
        return prefixes_of(self.train)

    @property
    def train_weights(self) -> list[float] | None:
        """The weights of :attr:`train`; None blends by size."""
        return weights_of(self.train)

    def check(self, prefix: str) -> None:
        """The blend is one. Raises ConfigurationError."""
        check_blend(f"{prefix}train", self.train)


class LRDecayStyle(str, Enum):
    """Shape of the learning rate after warm-up (Megatron's names)."""

    constant = "constant"
    """lr to the end."""
    linear = "linear"
    """Falls to min_lr on a straight line."""
    cosine = "cosine"
    """Falls to min_lr on half a cosine."""
    WSD = "WSD"
    """lr, and over the last lr_wsd_decay_iters steps down to min_lr."""


class WSDDecayStyle(str, Enum):
    """Shape of the final decay of a warmup-stable-decay schedule."""

    linear = "linear"
    """On a straight line."""
    cosine = "cosine"
    """On half a cosine."""
    exponential = "exponential"
    """As 2 * 0.5**t - 1, for t from 0 to 1."""
    minus_sqrt = "minus_sqrt"
    """As 1 - sqrt(t), for t from 0 to 1: fast at first."""


class OptimizerKind(str, Enum):
    """What updates the weights."""

    adamw = "adamw"
    """AdamW (arXiv 1711.05101) for all parameters."""
    muon = "muon"
    """Muon for the projections of mixers and feed-forwards, AdamW for all else: embeddings, output layer,
    norms, biases, routers, convolutions, and what says how states decay."""


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule.

    Chosen here: SpikingBrain's report gives no such numbers for its stages.
    """

    kind: OptimizerKind = setting(OptimizerKind.adamw, resume=refused("its state has other moments"))
    """What updates the weights; optimizer=muon_cosine chooses Muon."""
    lr: float = setting(5e-4, above=0, resume=SAID)
    """Peak learning rate, e.g. 2e-5 for a 7B."""
    min_lr: float = setting(0.0, minimum=0, resume=SAID)
    """Learning rate at the end of the decay; without a part in a constant schedule."""
    new_parameter_lr_mult: float = setting(1.0, minimum=0, resume=SAID)
    """Multiplier for parameters the source did not have (gates and output norms of linear attention)."""
    mixer_lr_mult: float = setting(1.0, minimum=0, resume=SAID)
    """Multiplier for all weights of mixers that replaced attention; those the source did not have are
    multiplied by new_parameter_lr_mult, too."""
    weight_decay: float = setting(0.1, minimum=0, resume=SAID)
    """Decoupled weight decay of matrices; norms, biases and branch weights have none."""
    adam_beta1: float = setting(0.9, minimum=0, below=1, must=_BETA, resume=SAID)
    """Decay of Adam's first moment, the mean of gradients."""
    adam_beta2: float = setting(0.95, minimum=0, below=1, must=_BETA, resume=SAID)
    """Decay of Adam's second moment, the mean of squared gradients."""
    adam_eps: float = setting(1e-8, above=0, resume=SAID)
    """Term added to the denominator of Adam's update."""
    muon_momentum: float = setting(0.95, minimum=0, below=1, must=_BETA, resume=SAID)
    """Decay of Muon's momentum, the mean of gradients."""
    muon_use_nesterov: bool = setting(True, resume=SAID)
    """Whether Muon adds the gradient to the momentum once more before it orthogonalizes them."""
    muon_num_ns_steps: int = setting(5, minimum=1, resume=SAID)
    """Iterations of Newton-Schulz, which make a matrix orthogonal."""
    muon_extra_scale_factor: float = setting(0.2, above=0, resume=SAID)
    """Root mean square of Muon's updates at a rate of 1. An orthogonal matrix of m x n is multiplied by this
    times sqrt(max(m, n)); 0.2 is about what AdamW's updates have, so that both take the same rate and weight
    decay (arXiv 2502.16982, section 2.2)."""
    muon_precision: Precision = setting(Precision.auto, resume=SAID)
    """Number format of the products of Newton-Schulz; auto is that of the run: bf16, as published, where the
    hardware multiplies it."""
    clip_grad: float = setting(1.0, minimum=0, resume=SAID)
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    lr_decay_style: LRDecayStyle = setting(LRDecayStyle.cosine, resume=SAID)
    """Shape of the learning rate after warm-up."""
    lr_warmup_iters: int = setting(0, minimum=0, resume=SAID)
    """Steps of linear warm-up from 0."""
    lr_wsd_decay_iters: int | None = setting(None, minimum=1, resume=SAID)
    """Steps of the final decay where lr_decay_style is WSD; a tenth of stage.train_iters is usual."""
    lr_wsd_decay_style: WSDDecayStyle = setting(WSDDecayStyle.minus_sqrt, resume=SAID)
    """Shape of the final decay where lr_decay_style is WSD."""
    phase_starts: list[float] = setting(default_factory=list, above=0, below=1, resume=SAID)
    """Shares of stage.train_iters after which a further phase of training begins, each above the one before,
    e.g. [0.5]; empty is one phase. The rate goes on along its shape, times a factor (the two phases of BitNet
    b1.58, arXiv 2504.12285: optimizer=bitnet_two_phase)."""
    phase_lr_mults: list[float] = setting(default_factory=list, above=0, resume=SAID)
    """Multiplier of every learning rate, min_lr included, in each of the phases of phase_starts."""
    phase_weight_decays: list[float] = setting(default_factory=list, minimum=0, resume=SAID)
    """Weight decay in each of the phases of phase_starts; empty keeps weight_decay in all."""

    def later_phase(self, step: int, train_iters: int) -> tuple[float, float] | None:
        """Multiplier of learning rates and weight decay; None in the first phase, which has the settings'.

        Args:
            step: counted from 1.
            train_iters: steps of the stage.
        """
        begun = sum(step > share * train_iters for share in self.phase_starts)
        if not begun:
            return None
        decays = self.phase_weight_decays or [self.weight_decay] * begun
        return self.phase_lr_mults[begun - 1], decays[begun - 1]

    def check(self, prefix: str) -> None:
        """The rates fall, a final decay belongs to a style that has one, and phases follow each other.

        Raises ConfigurationError.
        """
        starts, mults, decays = self.phase_starts, self.phase_lr_mults, self.phase_weight_decays
        require(
            all(before < start for before, start in pairwise(starts)),
            f"{prefix}phase_starts={shown(starts)} must rise from phase to phase",
        )
        require(
            len(mults) == len(starts),
            f"{prefix}phase_starts names {len(starts)} phases and {prefix}phase_lr_mults {len(mults)}; give "
            f"every phase its multiplier (1 keeps the rate)",
        )
        require(
            len(decays) in (0, len(starts)),
            f"{prefix}phase_starts names {len(starts)} phases and {prefix}phase_weight_decays {len(decays)}; "
            f"give every phase its weight decay, or none",
        )
        style, decay = self.lr_decay_style, self.lr_wsd_decay_iters
        require(
            style is LRDecayStyle.constant or self.min_lr <= self.lr,
            f"{prefix}min_lr={self.min_lr} is above {prefix}lr={self.lr}; "
            f"it is the rate at the end of the decay",
        )
        require(
            style is LRDecayStyle.WSD or decay is None,
            f"{prefix}lr_wsd_decay_iters={decay} belongs to {prefix}lr_decay_style=WSD, but the style is "
            f"{style.name}; set it to null or choose optimizer=adamw_wsd",
        )


class Resume(str, Enum):
    """What a run does with checkpoints in its own output folder."""

    auto = "auto"
    """Continue from the newest one if there is one."""
    must = "must"
    """Continue from the newest one; an empty folder is an error."""
    never = "never"
    """Refuse to start where checkpoints already lie."""


class WhileSaving(str, Enum):
    """What a run does when a checkpoint is due and the one before is still on its way to the disk."""

    wait = "wait"
    """Wait until that one is complete, then save."""
    skip = "skip"
    """Say so and go on; the next one is due after another save_interval."""


class OnDamage(str, Enum):
    """What a run does when the checkpoint that it would go on from is not what was saved."""

    stop = "stop"
    """End with a sentence that names the file, and the newest older checkpoint that is complete."""
    previous = "previous"
    """Say so, rename it to ``iter_*.damaged``, and go on from the newest one that is whole."""


class MemoryCopies(str, Enum):
    """Who keeps a rank's state in memory."""

    auto = "auto"
    """The rank itself and, in runs on several hosts, a rank of the next one."""
    own = "own"
    """The rank itself: enough where processes are killed, not where a host is lost."""
    neighbour = "neighbour"
    """The rank itself and another one, on the next host where there are several."""


class Verification(str, Enum):
    """What of a checkpoint is looked at before a run goes on from it."""

    full = "full"
    """Every byte that is read is held to its checksum."""
    fast = "fast"
    """Sizes of all files, and the contents of small ones."""


@dataclass
class CheckpointConfig:
    """Where weights come from and where they go."""

    load: str | None = setting(None, resume=said("its weights are read at the start only"))
    """Megatron checkpoint folder a new run starts from (weights only). Null starts from random weights."""
    resume: Resume = setting(Resume.auto, resume=FREE)
    """What happens to checkpoints that this run has already written to its output_dir."""
    save_interval: int = setting(1000, minimum=1, resume=FREE)
    """Steps between checkpoints; one is always written at the end."""
    async_save: bool = setting(False, resume=FREE)
    """Go on training while a checkpoint is written: steps stand still only until its numbers are copied to
    host memory, which has to hold them a second time. The last one is waited for."""
    while_saving: WhileSaving = setting(WhileSaving.wait, resume=FREE)
    """With async_save: what happens when a checkpoint is due while the one before is being written."""
    keep_last: int | None = setting(None, minimum=1, resume=FREE)
    """How many of this run's checkpoints to keep; null keeps all."""
    keep_every: int | None = setting(None, minimum=1, resume=FREE)
    """Checkpoints of iterations that this number divides are kept beside the keep_last newest; null keeps
    none of them."""
    verification: Verification = setting(Verification.full, resume=FREE)
    """What is looked at before the run goes on from one of its checkpoints."""
    on_damage: OnDamage = setting(OnDamage.stop, resume=FREE)
    """What happens when the newest one is damaged."""
    memory_interval: int = setting(0, minimum=0, resume=FREE)
    """Steps between copies of the state in the memory of the hosts, from which killed processes go on without
    the disk; 0 keeps none."""
    memory_copies: MemoryCopies = setting(MemoryCopies.auto, resume=FREE)
    """Who keeps them."""
    memory_folder: str = setting("/dev/shm", resume=FREE)
    """Folder in memory for them, on every host: it has to outlive a process and hold weights and optimizer
    state of the host's ranks twice, or with copies for other ranks four times."""


class WandbMode(str, Enum):
    """How Weights & Biases is used."""

    disabled = "disabled"
    """Not used."""
    offline = "offline"
    """Written to the output folder, no account needed; `wandb sync` uploads it later."""
    online = "online"
    """Uploaded while the run lives; needs `wandb login`. Where W&B cannot be reached, as offline."""


@dataclass
class LoggingConfig:
    """What is reported, how often, and where to."""

    log_interval: int = setting(10, minimum=1, resume=FREE)
    """Steps between progress lines and metric points."""
    eval_interval: int = setting(0, minimum=0, resume=FREE)
    """Steps between evaluations on the held-out data; 0 evaluates only at the end."""
    eval_iters: int = setting(16, minimum=1, resume=SAID)
    """Global batches of one evaluation, at most."""
    evaluators: list[Any] = setting(default_factory=list, resume=SAID)
    """What evaluations measure beside the held-out cross entropy: import paths of classes
    (spikingbrain_train.evaluation.evaluator.Evaluator), each as package.module.Class or {path, settings}."""
    transform_statistics_tokens: int = setting(64, minimum=0, resume=FREE)
    """Tokens of a step that each linear counts spikes of, on every rank, in the steps whose metrics are
    reported; 0 counts in evaluations only."""
    tensorboard: bool = setting(True, resume=FREE)
    """Write TensorBoard events to <output_dir>/tensorboard."""
    wandb: WandbMode = setting(WandbMode.disabled, resume=FREE)
    """Whether Weights & Biases gets metrics, and how."""
    wandb_project: str = setting("spikingbrain-train", resume=FREE)
    """Project of Weights & Biases that runs are filed under."""
    wandb_name: str | None = setting(None, resume=FREE)
    """Name of the run in Weights & Biases; null lets it choose one."""
    alert_command: str | None = setting(None, resume=FREE)
    """Command that is started with title and text of an alert as its last arguments: a slow rank, trouble
    with numbers, a restart, the end of the run. W&B, where used, gets alerts without it."""

    def check(self, prefix: str) -> None:
        """Names of classes have the form of one. Raises ConfigurationError."""
        named_classes(f"{prefix}evaluators", self.evaluators)


@dataclass
class RunConfig:
    """One training run. `spikingbrain-train --cfg job` prints it in full."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network; `model=from_checkpoint` (the default) takes it from checkpoint.load."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the work is spread over ranks."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Platform, devices and kernels."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read: indexed datasets and their tokenizer."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    stage: StageConfig = field(default_factory=StageConfig)
    """What is trained and for how long."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Loading and saving."""
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    """NaN, infinity and spikes of the loss."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """FP8 products of linears."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Progress lines, metrics and evaluations."""
    plugins: list[str] = setting(default_factory=list, resume=FREE)
    """Modules that register mixers or feed-forwards of their own (CONTRIBUTING.md); imported at start."""
    callbacks: list[Any] = setting(default_factory=list, resume=SAID)
    """What else hangs on the run's hooks: import paths of classes (docs/callbacks.md), each as
    package.module.Class or {path, settings}."""
    output_dir: str = setting(MISSING, resume=FREE)
    """Folder of this run: checkpoints, metrics, logs."""
    precision: Precision = setting(
        Precision.auto, resume=refused("weights and optimizer state have another number format")
    )
    """Number format of weights and activations: fp32, bf16, or auto, the faster one here."""
    seed: int = setting(
        1234,
        minimum=0,
        below=2**32,
        must=f"be at least 0 and below 2**32 = {2**32}, the range of NumPy's seeds",
        resume=refused(OTHER_ORDER),
    )
    """Seed of initial weights, data order and dropout."""
    dry_run: bool = setting(False, resume=FREE)
    """Print the plan, build one rank's share of the model without memory, and exit without training."""
    dry_run_rank: int = setting(0, resume=FREE)
    """The rank whose share of the model a dry run builds, from 0."""

    def check(self, prefix: str) -> None:
        """Names of classes have the form of one. Raises ConfigurationError."""
        named_classes(f"{prefix}callbacks", self.callbacks)
