"""How many processes the suite takes, and in which order they take its files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests import workers

GIB = 2**30


def _config(*, named: bool = False, capture: str = "fd", **options: Any) -> Any:
    """What pytest knows of a command line."""
    source = pytest.Config.ArgsSource
    return SimpleNamespace(
        args_source=source.ARGS if named else source.TESTPATHS,
        option=SimpleNamespace(capture=capture),
        getoption=lambda name, default: options.get(name, default),
    )


@pytest.mark.parametrize(
    ("cores", "memory", "expected"),
    [
        (1, 64 * GIB, 0),
        (2, 16 * GIB, 3),
        (2, 8 * GIB, 2),
        (4, 64 * GIB, 6),
        (8, 64 * GIB, 8),
        (64, 512 * GIB, 8),
        (8, 7 * GIB, 2),
        (8, 4 * GIB, 0),
    ],
)
def test_the_whole_suite_takes_three_processes_for_two_cores_where_memory_allows_it(
    monkeypatch: pytest.MonkeyPatch, cores: int, memory: int, expected: int
) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: cores)
    monkeypatch.setattr(workers, "memory_limit", lambda: memory)
    assert workers.pytest_xdist_auto_num_workers(_config()) == expected


@pytest.mark.parametrize(
    "config",
    [
        _config(named=True),
        _config(keyword="resumed"),
        _config(lf=True),
        _config(capture="no"),
    ],
    ids=["named", "-k", "--lf", "-s"],
)
def test_a_part_of_the_suite_stays_in_one_process(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: 8)
    monkeypatch.setattr(workers, "memory_limit", lambda: 64 * GIB)
    assert workers.pytest_xdist_auto_num_workers(config) == 0


def _test(file: str, *, marks: tuple[str, ...] = (), fixtures: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        location=(file, 0, ""),
        iter_markers=lambda: [SimpleNamespace(name=mark) for mark in marks],
        fixturenames=fixtures,
    )


def test_long_files_come_first_and_each_keeps_the_order_of_its_tests() -> None:
    many = [_test("test_many.py") for _ in range(15)]
    slow = [_test("test_slow.py"), _test("test_slow.py", marks=("slow", "parametrize"))]
    on_ranks = [_test("test_on_ranks.py", fixtures=("tmp_path", "ranks")), _test("test_on_ranks.py")]
    mixed = [many[0], *slow, *on_ranks, *many[1:]]
    assert workers.longest_files_first(mixed) == [*slow, *on_ranks, *many]
