"""Numbers as people say them."""

from __future__ import annotations

_GIB = 2**30


def quantity(number: float) -> str:
    """A count with four digits and a unit letter: 134.5 M, 7.617 B."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g} {letter}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes: 99.31 GiB, 12.0 MiB."""
    return f"{number / _GIB:.2f} GiB" if number >= _GIB else f"{number / 2**20:.1f} MiB"


def hours(number: float) -> str:
    """Hours, or what a person says instead: ``48 s``, ``13 min``, ``175 hours (7.3 days)``."""
    if number < 1 / 60:
        return f"{number * 3600:.3g} s"
    if number < 1:
        return f"{number * 60:.3g} min"
    return f"{number:,.0f} hours ({number / 24:,.1f} days)" if number >= 48 else f"{number:.3g} hours"
