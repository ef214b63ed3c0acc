"""Which models have zeros to count. Said without torch."""

from __future__ import annotations


def nothing_is_zero(name: str, activation: str) -> str:
    """The sentence for models whose gates have no zeros, or none that a threshold decides."""
    return (
        f"{name} has no zeros to count: its gates go through {activation}, not relu or fatrelu; convert "
        "the dense source with --conversion prosparse (activation_func=relu), train it, and name that"
    )
