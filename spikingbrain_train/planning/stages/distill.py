"""Distillation: all parameters learn the dense source's distribution over the next token.

The stage is this project's own; SpikingBrain's report (arXiv 2509.05276) has none.
"""

from __future__ import annotations

from spikingbrain_train.architecture.layers import dense_source
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.planning.costs import forward_flops_per_token
from spikingbrain_train.planning.stages.token_loss import TokenLossKind
from spikingbrain_train.planning.teacher_cache import check_cache
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint


class DistillationKind(TokenLossKind):
    """``stage.kind=distill``."""

    name = "distill"
    trained_by = "spikingbrain_train.training.stages.distillation:LogitDistillation"

    def describe(self, config: RunConfig) -> str:
        """What is learnt, and from whom."""
        stage = config.stage
        share, cache = stage.distillation.share, stage.distillation.cache
        source = f"the logits of {stage.teacher}" if cache is None else f"the teacher's logits in {cache}"
        text = f"{self.name}: {self.learners(config.model)} learn from {source}"
        return text if share == 1 else f"{text} ({share:.0%} of the loss) and to predict the next token"

    def reason_for_teacher(self, stage: StageConfig) -> str | None:
        """Where no cache stands for it."""
        return f"stage.kind={self.name}" if stage.distillation.cache is None else None

    def all_settings(self, stage: StageConfig) -> set[str]:
        """Those of distillation."""
        return super().all_settings(stage) | set(leaves(stage.distillation, "stage.distillation."))

    def check(self, stage: StageConfig) -> None:
        """There is something to distil. Raises ConfigurationError."""
        require(
            stage.distillation.share > 0,
            f"stage.distillation.weight={stage.distillation.weight} leaves stage.kind={self.name} nothing to "
            f"distil; train on next-token loss alone with stage.kind=cpt stage.distillation.weight=null",
        )

    def check_teacher(
        self,
        stage: StageConfig,
        model: ModelConfig,
        teacher: ModelConfig,
        parallel: ParallelConfig,
        setting: str,
    ) -> None:
        """Logits are comparable over one vocabulary only, and pipeline ranks hold layers of both models.

        Raises:
            CheckpointError: the vocabularies differ.
            ConfigurationError: the teacher does not fit the pipeline.
        """
        if teacher.vocab_size != model.vocab_size:
            raise CheckpointError(
                f"{setting} has a vocabulary of {teacher.vocab_size}, but model.vocab_size="
                f"{model.vocab_size}; distillation needs a teacher with the same tokenizer"
            )
        stages = parallel.pipeline_model_parallel_size * parallel.virtual_stages
        if parallel.pipeline_model_parallel_layout is None:
            fits, needs = teacher.num_layers % stages == 0, f"a multiple of {stages}"
        else:
            fits, needs = teacher.num_layers == model.num_layers, f"the model's {model.num_layers}"
        require(
            fits,
            f"{setting} has {teacher.num_layers} layers, but pipeline stages hold layers of both models, so "
            f"their number must be {needs}; choose other parallel.pipeline_model_parallel_* settings, or "
            "distil from a cache of its logits (stage.distillation.cache)",
        )
        require(
            parallel.virtual_stages == 1 or teacher.hidden_size == model.hidden_size,
            f"{setting} has hidden size {teacher.hidden_size} and the model {model.hidden_size}, which "
            "megatron-core's interleaved schedule cannot send side by side; set "
            "parallel.virtual_pipeline_model_parallel_size to null, or distil from a cache of its logits "
            "(stage.distillation.cache)",
        )

    def check_files(self, config: RunConfig, samples: range) -> None:
        """The cache is of this run's samples, and has them; the teacher is not what the run starts from.

        Raises:
            ConfigurationError, DataError, CheckpointError: otherwise.
        """
        check_cache(config, samples)
        load, teacher = config.checkpoint.load, config.stage.teacher
        if load is None or teacher is None or not self.needs_teacher(config.stage):
            return
        both = [latest_checkpoint(load, "checkpoint.load"), latest_checkpoint(teacher, "stage.teacher")]
        is_same = both[0].resolve() == both[1].resolve() and read_stored_model(both[1]) == config.model
        require(
            not is_same or config.stage.distillation.share < 1,
            f"stage.teacher={teacher} is what checkpoint.load names, too, so that the model would learn what "
            "it says already; name the dense source (converted with conversion dense)",
        )

    def flops_per_token(self, config: RunConfig) -> float:
        """The teacher's forward on top of the student's training, unless its logits are read from a cache."""
        if not self.needs_teacher(config.stage):
            return super().flops_per_token(config)
        teacher = forward_flops_per_token(dense_source(config.model), config.stage.seq_length)
        return super().flops_per_token(config) + teacher
