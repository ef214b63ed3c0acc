"""The time until the first step is accounted for, by part."""

from __future__ import annotations

import subprocess
import sys
import time

from spikingbrain_train.reporting.start_times import REST, StartTimes


def test_parts_add_up_to_the_whole_and_inner_ones_belong_to_outer_ones() -> None:
    now = [100.0]
    times = StartTimes(90.0, lambda: now[0])
    times.add("imports", times.until_now())
    with times.part("opening the data"):
        now[0] += 2
        with times.part("checking tokens"):
            now[0] += 3
    now[0] += 1
    for _ in range(2):
        with times.part("evaluating"):
            now[0] += 4.5
    times.finish()
    now[0] += 50
    times.finish()
    with times.part("evaluating"):  # a later one is no part of the start
        now[0] += 7
    assert times.total == 25
    assert times.parts == {"imports": 10, "evaluating": 9, "opening the data": 5, REST: 1}
    assert times.describe() == (
        "25s after the start: 10.0 s imports, 9.0 s evaluating, 5.0 s opening the data, 1.0 s the rest"
    )


def test_a_process_knows_when_it_began_though_it_looks_late() -> None:
    code = (
        "import time; time.sleep(1.0)\n"
        "from spikingbrain_train.reporting.start_times import process_began\n"
        "print(time.monotonic() - process_began())"
    )
    began = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert 1.0 < age < time.monotonic() - began + 0.05
