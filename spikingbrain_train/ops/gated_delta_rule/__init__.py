"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464), the recurrence of Qwen3-Next's linear layers.

To understand it, read ``naive`` first (the definition), then ``chunk`` (how chunks of tokens are put
together and where the backward pass is), then ``end_state`` (what a slice of tokens does to a state before
it).
"""

from spikingbrain_train.ops.gated_delta_rule.dispatch import choose_backend, gated_delta_rule
from spikingbrain_train.ops.gated_delta_rule.end_state import gated_delta_rule_end_state
from spikingbrain_train.ops.gated_delta_rule.naive import gated_delta_rule_step

__all__ = ["choose_backend", "gated_delta_rule", "gated_delta_rule_end_state", "gated_delta_rule_step"]
