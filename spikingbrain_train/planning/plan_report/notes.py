"""What to know before a run that is none of the other sections' matter: settings that nothing reads."""

from __future__ import annotations

from spikingbrain_train.planning.plan_report.section import Section
from spikingbrain_train.planning.planner import Plan
from spikingbrain_train.planning.unread_settings import unread_settings
from spikingbrain_train.reporting.tables import facts


def notes_section(plan: Plan) -> Section | None:
    """A line for every setting without effect; None where all that was set has one."""
    lines = [each.describe() for each in unread_settings(plan.config)]
    if not lines:
        return None
    return Section("notes", lines, lambda width: facts([("note", line) for line in lines], width))
