"""A student against its teacher while it trains: name it in ``logging.evaluators``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.evaluation.against_teacher.comparison import compare
from spikingbrain_train.evaluation.against_teacher.plan import NEW_TOKENS, PROMPT_TOKENS, TeacherPlan
from spikingbrain_train.evaluation.against_teacher.recording import record_of_checkpoint, record_of_folder
from spikingbrain_train.evaluation.against_teacher.teacher_record import TeacherRecord
from spikingbrain_train.evaluation.checkpoint_request import for_reading, request_in_run
from spikingbrain_train.evaluation.evaluator import EvaluatedRun, Evaluator
from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
from spikingbrain_train.evaluation.model_folder import check_model_folder, is_megatron_checkpoint
from spikingbrain_train.evaluation.pretrained import load_causal_lm
from spikingbrain_train.evaluation.run_tokenizer import tokenizer_of_run
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.storage.tokenizer_files import has_tokenizer


class AgainstTeacher(Evaluator):
    """``against_teacher/...`` on prompts of ``data.valid``, in every evaluation of a run.

    The teacher is loaded, recorded and let go at the first of them.

    Args:
        teacher: Hugging Face folder, or Megatron checkpoint, which is read in the topology of the run.
        prompts: windows of held-out text.
        prompt_tokens: of each.
        new_tokens: that both write behind it.
        trust_remote_code: run modelling code that lies in the folder.
    """

    shown = {
        "against_teacher/agreement": Shown("agreement", "{:.3f}"),
        "against_teacher/kl_divergence": Shown("KL along the teacher's text", "{:.4f}"),
    }

    def __init__(
        self,
        teacher: str,
        prompts: int = 32,
        prompt_tokens: int = PROMPT_TOKENS,
        new_tokens: int = NEW_TOKENS,
        trust_remote_code: bool = False,
    ) -> None:
        self._plan = TeacherPlan(Path(teacher), (), prompts, prompt_tokens, new_tokens)
        self._plan.check("")
        self._is_checkpoint = is_megatron_checkpoint(self._plan.teacher, "teacher")
        if not self._is_checkpoint:
            check_model_folder(self._plan.teacher, trust_remote_code)
        self._trust_remote_code = trust_remote_code
        self._record: TeacherRecord | None = None

    def evaluate(self, run: EvaluatedRun) -> dict[str, float]:
        tokenizer = self._tokenizer(run)
        if self._record is None:
            states = run.groups.accelerator.get_rng_state()
            self._record = self._recorded(run, tokenizer)
            run.groups.accelerator.set_rng_state(states)
        model = MegatronLanguageModel(run.model, run.groups, TextTokenizer(tokenizer), show=run.activity)
        return compare(model, self._record).metrics()

    def _tokenizer(self, run: EvaluatedRun) -> Path:
        """The run's own, or that in the teacher's folder."""
        try:
            return tokenizer_of_run(run.config)
        except ConfigurationError:
            if self._is_checkpoint or not has_tokenizer(self._plan.teacher):
                raise
            return self._plan.teacher

    def _recorded(self, run: EvaluatedRun, tokenizer: Path) -> TeacherRecord:
        if not run.config.data.valid:
            raise ConfigurationError(
                "logging.evaluators compares texts with those of a teacher, whose prompts are held-out text; "
                "name some with data.valid"
            )
        plan, groups = self._plan.on(run.config.data.valid), run.groups
        if self._is_checkpoint:
            request = for_reading(request_in_run(plan.teacher, run.config, flag="teacher"))
            return record_of_checkpoint(plan, request, tokenizer, groups, run.activity)
        load = partial(
            load_causal_lm,
            plan.teacher,
            trust_remote_code=self._trust_remote_code,
            dtype=run.model.config.params_dtype,
            device=groups.device,
        )
        return record_of_folder(plan, load, tokenizer, groups, run.activity)
