"""How much of the source's training the stages together have taken so far."""

from __future__ import annotations

from spikingbrain_train.planning.token_history import describe_share
from spikingbrain_train.reporting.progress import Shown
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report


class AllTokens(Callback):
    """Reports the tokens of this stage and of those before it, and their share of the source's.

    As ``train/all_tokens``, where those before are known, and ``train/source_token_share``, where somebody
    has said what the source was trained on (``data.source_tokens``). The progress line shows the share where
    it reads other than before.
    """

    _said = ""

    def report_due(self, report: Report) -> None:
        run = self.run
        own = run.state.consumed_samples * run.config.stage.seq_length
        tokens, share = run.record.all_tokens(own), run.record.source_share(own)
        if tokens is not None:
            report.add("train/all_tokens", float(tokens))
        if tokens is None or share is None:
            return
        history = run.record.history
        assert history is not None and history.source_tokens is not None  # else there is no share
        said = describe_share(tokens, history.source_tokens)
        report.add("train/source_token_share", share, Shown("source", said) if said != self._said else None)
        self._said = said
