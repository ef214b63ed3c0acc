"""All probes by name."""

from __future__ import annotations

from spikingbrain_train.evaluation.probes.associative_recall import AssociativeRecall
from spikingbrain_train.evaluation.probes.needles import NEEDLES
from spikingbrain_train.evaluation.probes.pass_key import PassKey
from spikingbrain_train.evaluation.probes.sample import Probe
from spikingbrain_train.evaluation.probes.variable_tracking import VariableTracking

PROBES: dict[str, Probe] = {
    probe.name: probe for probe in (PassKey(), *NEEDLES, VariableTracking(), AssociativeRecall())
}
