"""What the events of a profiled step add up to: seconds and FLOPs of every part, the longest operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spikingbrain_train.training.profiling.parts import COMMUNICATION, GRADIENTS, RANGE, REST

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
"""Matrix products, whose FLOPs torch's profiler counts. Fused attention and convolutions are not in."""
STEP = "step"
_BACKWARD = "autograd::engine::evaluate_function"
_NODE = 1
"""The scope of a node's own event, which carries the number of its maker (torch's RecordScope)."""
_ACCUMULATES = f"{_BACKWARD}: torch::autograd::AccumulateGrad"
_COMMUNICATES = ("c10d::", "gloo:", "nccl:", "record_param_comms", "ncclDevKernel", "ncclKernel")


@dataclass
class Part:
    """One part of a step, on one rank, summed over the profiled steps."""

    forward: float = 0.0
    """Seconds; what is computed again for the backward pass counts as backward."""
    backward: float = 0.0
    products: float = 0.0
    """Seconds of these in matrix products."""
    product_flops: float = 0.0

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward + self.backward


@dataclass
class Operator:
    """One operator, wherever it ran."""

    seconds: float = 0.0
    """Its own, without operators that it calls."""
    calls: int = 0


@dataclass
class StepSummary:
    """What one rank's profiled steps went to."""

    seconds: float
    """Wall time of the steps."""
    parts: dict[str, Part] = field(default_factory=dict)
    operators: dict[str, Operator] = field(default_factory=dict)
    unprofiled: float | None = None
    """Wall time of one step without the profiler; None where none was warm."""
    background: float = 0.0
    """Seconds of collectives in other threads, while the step goes on or waits for them."""


def summarize(events: Iterable[Any], *, on_gpu: bool) -> StepSummary:
    """Add up the events of torch's profiler.

    An event's own time belongs to the innermost range that it lies in. In the backward pass there are no
    ranges but around what is computed again: a node of the graph belongs to the part whose operator made it,
    which torch says by a sequence number. Adding up a weight's gradient is no part's. On a GPU the time of
    kernels is counted, on the CPU that of operators in the step's thread, with Python's between them; what of
    the step neither explains is "rest".

    Args:
        events: ``torch.profiler.profile().events()``.
        on_gpu: whether kernels compute.
    """
    listed = [event for event in events if _on_cpu(event)]
    steps = [event for event in listed if event.name == STEP]
    found = StepSummary(sum(event.cpu_time_total for event in steps) / 1e6)
    threads = {event.thread for event in steps}
    places: dict[int, tuple[str | None, bool]] = {}
    makers = _makers(listed, places)
    explained = 0.0
    for event in listed:
        part, backward = _place(event, places, makers)
        if not on_gpu and event.thread not in threads:
            if event.name.startswith(_COMMUNICATES):
                found.background += event.self_cpu_time_total / 1e6
            continue
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if (seconds == 0.0 and not event.flops) or not _is_within(event, steps):
            continue
        explained += seconds
        entry = found.parts.setdefault(part or REST, Part())
        if backward:
            entry.backward += seconds
        else:
            entry.forward += seconds
        if event.name in PRODUCTS:
            entry.products += seconds
            entry.product_flops += event.flops or 0
        if not event.name.startswith(RANGE) and event.name != STEP:
            operator = found.operators.setdefault(event.name, Operator())
            operator.seconds += seconds
            operator.calls += 1
    if on_gpu:  # waits of the GPU; where streams overlap there may be none left
        idle = found.seconds - explained
        found.parts.setdefault(REST, Part()).forward += max(idle, 0.0)
    return found


def _on_cpu(event: Any) -> bool:
    return str(event.device_type).endswith("CPU")


def _is_within(event: Any, steps: Sequence[Any]) -> bool:
    start = event.time_range.start
    return any(step.time_range.start <= start <= step.time_range.end for step in steps)


def _makers(events: Sequence[Any], places: dict[int, tuple[str | None, bool]]) -> dict[tuple[int, int], str]:
    """(Thread, sequence number) -> the part whose operator made the node of the graph with that number.

    Every thread counts by itself. Operators that make no node carry the number of the next that does, so the
    last one counts. What is computed again inside the backward pass makes nodes, too.
    """
    makers: dict[tuple[int, int], tuple[float, str]] = {}
    for event in events:
        if event.sequence_nr < 0 or event.scope == _NODE or event.name.startswith(_BACKWARD):
            continue
        part, _ = _place(event, places, {})
        if part is None:
            continue
        start, key = event.time_range.start, (event.thread, event.sequence_nr)
        if key not in makers or makers[key][0] <= start:
            makers[key] = (start, part)
    places.clear()  # nodes had no part yet
    return {number: part for number, (_, part) in makers.items()}


def _place(
    event: Any, places: dict[int, tuple[str | None, bool]], makers: Mapping[tuple[int, int], str]
) -> tuple[str | None, bool]:
    """The part that an event belongs to, None for none, and whether it lies in the backward pass."""
    chain = []
    while event is not None and id(event) not in places:
        chain.append(event)
        event = event.cpu_parent
    place = (None, False) if event is None else places[id(event)]
    for each in reversed(chain):
        part, backward = place
        if each.name.startswith(RANGE):
            part = each.name.removeprefix(RANGE)
        elif each.name == _ACCUMULATES:
            part, backward = GRADIENTS, True
        elif each.name.startswith(_BACKWARD):
            part, backward = makers.get((each.fwd_thread, each.sequence_nr), part), True
        elif each.name.startswith(_COMMUNICATES):
            part = COMMUNICATION
        place = places[id(each)] = (part, backward)
    return place
