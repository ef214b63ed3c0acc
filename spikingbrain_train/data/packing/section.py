"""What a run packs, as a section of its plan."""

from __future__ import annotations

import textwrap

from spikingbrain_train.data.packing.layout import packing_of
from spikingbrain_train.data.packing.report import describe_packing, domain_table, statistics_table, warnings
from spikingbrain_train.data.packing.statistics import PackingStatistics, packing_statistics
from spikingbrain_train.errors import DataError
from spikingbrain_train.planning.plan_report.section import Section
from spikingbrain_train.planning.planner import Plan
from spikingbrain_train.planning.stages.registry import kind_of


def packing_section(plan: Plan) -> Section | None:
    """The samples of data.train; None where they are cut from the text as it lies on disk, or none is here.

    Reads the indexes of the datasets: seconds for ten million documents.
    """
    config = plan.config
    packing = packing_of(config.data, config.stage.seq_length)
    if packing is None or kind_of(config.stage).reads_examples:
        return None
    found: list[PackingStatistics] = []
    said: list[str] = []
    for number, prefix in enumerate(config.data.train_prefixes):
        try:
            found.append(packing_statistics(prefix, packing))
            said += warnings(found[-1], f"data.train[{number}]")
        except DataError:  # the section of the data says it
            continue
    if not found:
        return None
    values = {"datasets": [each.as_values() for each in found], "warnings": said}
    lines = [describe_packing(packing), *statistics_table([(each.prefix, each) for each in found])]
    for each in found:
        lines += ["", *domain_table(each)] if each.domains else []

    def text(width: int) -> list[str]:
        wrapped = [
            line
            for warning in said
            for line in textwrap.wrap(
                f"warning: {warning}", width, break_long_words=False, break_on_hyphens=False
            )
        ]
        return [*textwrap.wrap(lines[0], width), *lines[1:], *wrapped]

    return Section("packing", values, text)
