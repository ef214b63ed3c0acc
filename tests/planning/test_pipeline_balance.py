"""Layouts whose longest pipeline stage is as short as can be, and what a plan says of them."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.planning.costs import forward_flops_per_token
from spikingbrain_train.planning.pipeline_balance import balanced_layout, pipeline_balance
from spikingbrain_train.planning.plan_report.report import as_values, render
from spikingbrain_train.planning.planner import Plan, plan_run


@given(st.data())
def test_no_other_layout_has_a_shorter_longest_stage(data: st.DataObject) -> None:
    work = data.draw(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=8))
    stages, last = data.draw(st.integers(1, len(work))), float(data.draw(st.integers(0, 20)))

    def longest(cuts: tuple[int, ...]) -> float:
        ends = [0, *cuts, len(work)]
        of_stages = [sum(work[first:end]) for first, end in zip(ends, ends[1:], strict=False)]
        return max(*of_stages[:-1], of_stages[-1] + last, 0.0)

    found = balanced_layout(work, stages, last)
    assert len(found) == stages and min(found) >= 1 and sum(found) == len(work)
    cuts = tuple(sum(found[:end]) for end in range(1, stages))
    assert longest(cuts) == min(map(longest, combinations(range(1, len(work)), stages - 1)))


def _plan(*settings: str) -> Plan:
    return plan_run(to_run_config(compose_run([*settings, "dry_run=true"])), 4)


FOUR = ("model=spikingbrain_7b", "parallel.pipeline_model_parallel_size=4")


def test_stages_share_what_a_forward_pass_costs() -> None:
    config = _plan(*FOUR).config
    balance = pipeline_balance(config.model, config.parallel, config.stage.seq_length)
    whole = forward_flops_per_token(config.model, config.stage.seq_length)
    assert sum(balance.stages) == pytest.approx(whole) and sum(balance.best) == pytest.approx(whole)
    assert max(balance.best) == pytest.approx(max(balance.stages) * (1 - balance.gain))


def test_a_plan_names_the_layout_that_would_be_faster_until_it_has_it() -> None:
    plan = _plan(*FOUR)
    layout = as_values(plan)["run"]["balanced_pipeline_layout"]
    assert layout[-1] == min(layout) < 7  # the vocabulary projection of 152,064 is as much as two layers
    words = f"pipeline_model_parallel_layout=[{','.join(map(str, layout))}]"
    assert words in render(plan, 400) and "pipeline stages wait" in render(plan, 400)
    balanced = _plan(*FOUR, f"parallel.pipeline_model_parallel_layout={layout}")
    assert "pipeline stages wait" not in render(balanced, 400)


def test_a_plan_of_one_stage_or_with_a_teacher_says_nothing_of_it() -> None:
    assert as_values(_plan("model=spikingbrain_7b"))["run"]["balanced_pipeline_layout"] is None
    distilled = _plan(*FOUR, "stage=distill", "stage.teacher=dense")
    assert as_values(distilled)["run"]["balanced_pipeline_layout"] is None
