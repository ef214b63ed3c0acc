"""Long-context probes while a run trains: name it in ``logging.evaluators``."""

from __future__ import annotations

from pathlib import Path

from spikingbrain_train.evaluation.evaluator import EvaluatedRun, Evaluator
from spikingbrain_train.evaluation.probes.plan import SEED, ProbePlan, length_name
from spikingbrain_train.evaluation.run_tokenizer import tokenizer_of_run
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer
from spikingbrain_train.reporting.progress import Shown


class LongContextProbes(Evaluator):
    """``probes/<probe>/<length>``, the share of answers found, in every evaluation of a run.

    Args:
        probes: as for ``--probes`` of spikingbrain-evaluate, with commas between them.
        lengths: tokens, ``1k,4k``.
        depths: percent, ``0,50,100``.
        samples: of each length and depth.
        text: file of a text in which needles are hidden; None takes Python's documentation topics.
        seed: of all that is drawn; the questions are the same in every evaluation.
    """

    def __init__(
        self,
        probes: str = "passkey,needle,associative_recall",
        lengths: str = "1k",
        depths: str = "0,50,100",
        samples: int = 4,
        text: str | None = None,
        seed: int = SEED,
    ) -> None:
        self._plan = ProbePlan.of(
            probes,
            str(lengths),
            depths=str(depths),
            samples=samples,
            seed=seed,
            text=None if text is None else Path(text),
            prefix="",
        )
        self._tokenizer: TextTokenizer | None = None
        self._has_warned = False
        longest = length_name(self._plan.lengths[-1])
        self.shown = {
            f"probes/{probe.name}/{longest}": Shown(f"{probe.name} {longest}", "{:.2f}")
            for probe in self._plan.probes
        }

    def evaluate(self, run: EvaluatedRun) -> dict[str, float]:
        from spikingbrain_train.evaluation.megatron_language_model import MegatronLanguageModel
        from spikingbrain_train.evaluation.probes.measure import measure_probes

        if self._tokenizer is None:
            self._tokenizer = TextTokenizer(tokenizer_of_run(run.config))
        model = MegatronLanguageModel(run.model, run.groups, self._tokenizer, show=run.activity)
        found = measure_probes(model, self._plan, warns=not self._has_warned)
        self._has_warned = True
        return found.metrics()
