"""Which run started from which: stages are laid end to end only where each starts from the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.reporting.plots.recording import Recording
from spikingbrain_train.storage.checkpoint_folder import CHECKPOINT_FOLDER, iteration_of

_COMPARE = "draw them on one axis with --compare"


@dataclass(frozen=True)
class Stage:
    """A run in a row of runs."""

    recording: Recording
    until: int | None = None
    """The iteration that the next run started from, where that is not the last one of this run."""


def in_order(recordings: Sequence[Recording]) -> list[Stage]:
    """The runs in the order in which each starts from a checkpoint of the one before.

    Raises:
        ConfigurationError: they are no such row; says what stands between them.
    """
    if len(recordings) == 1:
        return [Stage(recordings[0])]
    for number, each in enumerate(recordings):
        if any(each.folder.resolve() == other.folder.resolve() for other in recordings[:number]):
            raise ConfigurationError(f"{each.folder} is named twice; name each run once")
    parents = {id(each): [other for other in recordings if _is_of(each, other)] for each in recordings}
    heads = [each for each in recordings if not parents[id(each)]]
    if len(heads) != 1:
        raise _no_row(recordings, heads)
    row = [heads[0]]
    while len(row) < len(recordings):
        following = [each for each in recordings if row[-1] in parents[id(each)]]
        if len(following) != 1:
            names = " and ".join(str(each.folder) for each in following)
            raise ConfigurationError(f"{names} both start from {row[-1].folder}; {_COMPARE}")
        row.append(following[0])
    return [
        Stage(each, _branching_point(each, row[number + 1]) if number + 1 < len(row) else None)
        for number, each in enumerate(row)
    ]


def _no_row(recordings: Sequence[Recording], heads: Sequence[Recording]) -> ConfigurationError:
    for each in heads:
        if not each.tells_its_start:
            return ConfigurationError(
                f"{each.folder} does not say what it started from (its metrics have no event lines, and it "
                f"has no checkpoint), so these runs are not laid end to end; {_COMPARE}"
            )
    # One of them may be the first; of the others it is said where they come from.
    first, second = (heads[0], heads[1]) if heads else (recordings[0], recordings[1])
    if second.load is None:
        first, second = second, first
    start = "random weights" if second.load is None else second.load
    return ConfigurationError(
        f"{second.folder} does not follow {first.folder}: it starts from {start}; name the run between them, "
        f"or {_COMPARE}"
    )


def _branching_point(earlier: Recording, later: Recording) -> int | None:
    """The iteration of ``earlier`` that ``later`` starts from, None where it is the last or not known."""
    _, iteration = _source_of(later.load or "")
    return iteration if iteration is not None and iteration < earlier.iterations else None


def _is_of(later: Recording, earlier: Recording) -> bool:
    """Whether ``later`` starts from a checkpoint that ``earlier`` wrote, wherever both lie by now."""
    if later is earlier or later.load is None:
        return False
    source, _ = _source_of(later.load)
    places = {str(earlier.folder.resolve())} | ({earlier.output_dir} if earlier.output_dir else set())
    return source is not None and any(_is_same_place(source, PurePath(place)) for place in places)


def _source_of(load: str) -> tuple[PurePath | None, int | None]:
    """The run that a checkpoint ``<run>/checkpoints/iter_0000100`` is of, None if converted; and its step."""
    path, iteration = PurePath(load), None
    if path.name.startswith("iter_") and path.name.removeprefix("iter_").isdigit():
        iteration, path = iteration_of(Path(path)), path.parent
    return (path.parent if path.name == CHECKPOINT_FOLDER else None), iteration


def _is_same_place(one: PurePath, other: PurePath) -> bool:
    """Whether two paths are one; of a relative one, as old runs have it, the folder above is not known."""
    if one.is_absolute() == other.is_absolute():
        return one == other
    whole, end = (one.parts, other.parts) if one.is_absolute() else (other.parts, one.parts)
    return len(end) > 0 and whole[-len(end) :] == end
