"""What is trained, and for how long: a stage and its own settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from omegaconf import MISSING

from spikingbrain_train.config.batch_size import BatchSizeRampConfig, BatchSizes
from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import ONLY_AT_THE_START, OTHER_ORDER, SAID, refused, said, setting
from spikingbrain_train.config.shown import shown


class AlignmentInputs(str, Enum):
    """Whose hidden states go into the mixers that learn in an align stage."""

    teacher = "teacher"
    """Those of the dense source: every layer learns on its own, as if all others were exact."""
    student = "student"
    """Those that the student itself makes, all earlier mixers in place: what it will see in use."""


class DecayStart(str, Enum):
    """Where the decays of linear attention begin in an align stage."""

    as_converted = "as_converted"
    """As the checkpoint has them: over all memories, the same in every head (model.gla.init_gate_bias_*)."""
    attention_distance = "attention_distance"
    """Around the mean distance that the dense source's heads look back (after arXiv 2606.16429)."""


@dataclass
class AlignmentConfig:
    """How an align stage starts the mixers, and on whose hidden states it trains them (docs/recipe.md)."""

    calibration_tokens: int = setting(8192, minimum=0, resume=ONLY_AT_THE_START)
    """Tokens on which the output projection of every linear attention layer is fitted to the dense layer's
    output by least squares before the first step; 0 keeps the source's projection. Rounded up to whole global
    batches, and no more than the steps of the stage read, where it has any.
    """
    calibration_ridge: float = setting(0.3, above=0, resume=ONLY_AT_THE_START)
    """Pull of that fit towards the source's projection, in units of the mean squared feature."""
    calibration_inputs: AlignmentInputs = setting(AlignmentInputs.student, resume=ONLY_AT_THE_START)
    """Whose hidden states the fit reads. With ``student`` layers are fitted one after the other, each on what
    the fitted ones before it make of the tokens, so that errors do not add up."""
    decay_start: DecayStart = setting(DecayStart.as_converted, resume=ONLY_AT_THE_START)
    """Where decays begin, before the keys are balanced and the projection is fitted."""
    fit_channel_scales: bool = setting(True, resume=ONLY_AT_THE_START)
    """Scale every channel of every head so that the head gives what the dense source's head gives, by
    non-negative least squares on a quarter of the calibration tokens. Of linear attention without q/k norms
    and rotary positions."""
    fit_source_projections: bool = setting(False, resume=ONLY_AT_THE_START)
    """Fit the output projections of attention that stays and of dense feed-forwards as well, so that they
    take back how far the student's hidden states have moved from the dense source's; needs
    calibration_inputs=student. Changes weights that an align stage does not train."""
    source_projection_ridge: float = setting(3.0, above=0, resume=ONLY_AT_THE_START)
    """Pull of those fits towards the source's projection, in units of the mean squared feature."""
    inputs: AlignmentInputs = setting(AlignmentInputs.teacher, resume=SAID)
    """Whose hidden states the mixers are trained on by gradient descent. ``student`` costs its forward pass,
    too."""

    def check(self, prefix: str) -> None:
        """Drift shows in the student's own hidden states alone. Raises ConfigurationError."""
        require(
            not self.fit_source_projections or self.calibration_inputs is AlignmentInputs.student,
            f"{prefix}fit_source_projections needs the student's own hidden states; set "
            f"{prefix}calibration_inputs=student, or {prefix}fit_source_projections=false",
        )


@dataclass
class DistillationConfig:
    """Learning from the dense source's logits in distill stages. SpikingBrain's report does without."""

    weight: float | None = setting(
        None, minimum=0, maximum=1, must="be above 0 and at most 1 (no cross entropy)", resume=SAID
    )
    """Share of the KL term, loss = (1 - weight) * cross entropy + weight * temperature^2 *
    KL(teacher || student); null is 1, the KL divergence alone."""
    temperature: float = setting(1.0, above=0, resume=SAID)
    """Divides the logits of teacher and student before the KL; above 1 the unlikely tokens count for more."""

    cache: str | None = setting(None, resume=SAID)
    """Folder that spikingbrain-cache-teacher wrote for this run: the teacher's likeliest tokens of every
    sample, which take the place of stage.teacher."""

    @property
    def share(self) -> float:
        """The weight, with what its null stands for."""
        return 1.0 if self.weight is None else self.weight


class LongExamples(str, Enum):
    """What becomes of an example that is longer than a sequence."""

    truncate = "truncate"
    """It is cut off where the sequence ends, and left out if no token with loss remains."""
    drop = "drop"
    """It is left out."""


@dataclass
class SupervisedConfig:
    """How an sft stage reads its examples (docs/sft.md)."""

    long_examples: LongExamples = setting(LongExamples.truncate, resume=refused(OTHER_ORDER))
    """What becomes of examples longer than stage.seq_length; the log and the plan count them."""


@dataclass
class SpikeAnnealingConfig:
    """Spikes grow coarser over the first steps: k goes geometrically from ``init_k`` to model.spiking.k.

    This project's own; SpikingBrain's report names no such schedule.
    """

    init_k: float | None = setting(None, resume=SAID)
    """k at the first step, usually larger than model.spiking.k. Null starts with model.spiking.k."""
    anneal_iters: int = setting(0, minimum=0, resume=SAID)
    """Steps until k has reached model.spiking.k; needs init_k."""


class _StraightLine:
    """A schedule from nothing to all over the first ``anneal_iters`` steps."""

    anneal_iters: int

    def share(self, iteration: int) -> float:
        """How far it has come after that many finished steps: 0 to 1."""
        return min(1.0, iteration / self.anneal_iters) if self.anneal_iters else 1.0


@dataclass
class QuantizationAnnealingConfig(_StraightLine):
    """Weights and inputs go to their quantised values over the first steps, on a straight line.

    INT8 weights, INT8 inputs and ternary weights alike; spikes have a schedule of their own.
    """

    anneal_iters: int = setting(0, minimum=0, resume=SAID)
    """Steps until all projections of model.quantization, model.int8_inputs, model.q8_inputs and model.ternary
    have quantised weights and inputs; 0 begins there."""


@dataclass
class SubNormAnnealingConfig(_StraightLine):
    """Sub-norms that a dense source lacks come in over the first steps, on a straight line.

    Projections read ``x + share * (norm(x) - x)``: at a share of 0 the source's own input. This project's
    own; BitNet Distillation (arXiv 2510.13998) puts them in at once.
    """

    anneal_iters: int = setting(0, minimum=0, resume=SAID)
    """Steps until the projections behind model.attn_sub_norm and model.ffn_sub_norm read what the norms make
    of their inputs, and nothing else; 0 begins there."""


@dataclass
class SparsityConfig:
    """An L1 loss that makes products inside feed-forwards zero, in stages (ProSparse, arXiv 2402.13516)."""

    l1_factors: list[float] = setting(default_factory=list, minimum=0, resume=SAID)
    """Weights of the loss, one for each stage of the schedule: the first holds from the beginning, each
    further one is reached at the end of its stage along half a sine from the one before; the last one stays.
    Empty is no such loss. Needs model.activation_func=relu or fatrelu."""
    l1_end_steps: list[int] = setting(default_factory=list, minimum=1, resume=SAID)
    """Step at which each stage of the schedule ends: as many as l1_factors, each behind the one before."""

    def check(self, prefix: str) -> None:
        """Stages follow each other. Raises ConfigurationError."""
        factors, ends = self.l1_factors, self.l1_end_steps
        require(
            len(factors) == len(ends),
            f"{prefix}l1_factors names {len(factors)} stages and {prefix}l1_end_steps {len(ends)}; give "
            f"every factor the step at which its stage ends",
        )
        require(
            all(before < end for before, end in pairwise(ends)),
            f"{prefix}l1_end_steps={shown(ends)} must rise from stage to stage",
        )

    def l1_factor(self, step: int) -> float:
        """The weight of the loss in the step that follows ``step`` done ones; 0 where there is no schedule.

        ``l0 + (l1 - l0) / 2 * (sin(-pi / 2 + pi * (t - t0) / (t1 - t0)) + 1)`` between the ends t0 and t1 of
        two stages (ProSparse, section 3.2).
        """
        if not self.l1_factors or step < self.l1_end_steps[0]:
            return self.l1_factors[0] if self.l1_factors else 0.0
        stages = list(zip(self.l1_end_steps, self.l1_factors, strict=True))
        for (begin, low), (end, high) in pairwise(stages):
            if step < end:
                share = (step - begin) / (end - begin)
                return low + (high - low) / 2 * (math.sin(math.pi * (share - 0.5)) + 1)
        return self.l1_factors[-1]


@dataclass
class StageConfig:
    """One stage of training. Stages run one after the other, each from the checkpoint of the one before."""

    kind: str = setting("cpt", resume=refused("another loss would train it"))
    """What is trained: align (new mixers learn, layer by layer, to reproduce the dense source's attention),
    distill (all parameters learn the dense source's distribution over the next token), cpt (continual
    pretraining of all parameters) or sft (all parameters learn the answers of conversations)."""
    train_iters: int = setting(MISSING, minimum=0, resume=SAID)
    """Optimizer steps of the stage, those before a resume included; 0 leaves an align stage its closed-form
    start alone."""
    seq_length: int = setting(MISSING, minimum=1, resume=refused(OTHER_ORDER))
    """Tokens of one training sequence, e.g. 8192; sink tokens come on top."""
    micro_batch_size: int = setting(1, minimum=1, resume=SAID)
    """Sequences that one rank processes at a time; more takes more memory, and changes no result."""
    global_batch_size: int = setting(
        MISSING, minimum=1, resume=said("the data go on behind the last sequence read; schedules go by steps")
    )
    """Sequences of one optimizer step over all ranks; what micro-batches do not hold at once is
    accumulated."""
    batch_size_ramp: BatchSizeRampConfig = field(default_factory=BatchSizeRampConfig)
    """Smaller steps at the beginning."""
    teacher: str | None = setting(None, resume=SAID)
    """Megatron checkpoint folder of the dense source, which align and distill stages learn from."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """How an align stage begins."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """What a distill stage learns."""
    sft: SupervisedConfig = field(default_factory=SupervisedConfig)
    """Examples of an sft stage."""
    spike_annealing: SpikeAnnealingConfig = field(default_factory=SpikeAnnealingConfig)
    """Schedule of the spike threshold."""
    quantization_annealing: QuantizationAnnealingConfig = field(default_factory=QuantizationAnnealingConfig)
    """Schedule of INT8 weights, INT8 inputs and ternary weights."""
    sub_norm_annealing: SubNormAnnealingConfig = field(default_factory=SubNormAnnealingConfig)
    """Schedule of sub-norms."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """Schedule of an L1 loss on what is inside feed-forwards."""

    @property
    def calibration_steps(self) -> int:
        """Global batches that the closed-form start of an align stage reads: the first ones of its steps."""
        needed = -(-self.alignment.calibration_tokens // (self.global_batch_size * self.seq_length))
        return min(needed, self.train_iters) if self.train_iters else needed

    @property
    def samples(self) -> int:
        """Sequences that the whole stage reads."""
        if self.train_iters == 0:
            return self.calibration_steps * self.global_batch_size
        return self.batch_sizes.read_by(self.train_iters)

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of every step."""
        return BatchSizes.of(self.batch_size_ramp, self.global_batch_size)

    @property
    def tokens(self) -> int:
        """Tokens that the whole stage reads."""
        return self.samples * self.seq_length

    def check(self, prefix: str) -> None:
        """The tokens of the stage can be counted. Raises ConfigurationError."""
        tokens = self.train_iters * self.global_batch_size * self.seq_length
        require(
            tokens < 2**63,
            f"{prefix}train_iters={self.train_iters} x {prefix}global_batch_size={self.global_batch_size} x "
            f"{prefix}seq_length={self.seq_length} = {tokens:.3g} tokens are more than 64 bits count; "
            f"lower one",
        )
