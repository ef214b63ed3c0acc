"""How many tokens ``sliding_window`` of a gla_swa config.json means.

The published modelling code disagrees with itself: its default path hands flash-attention
``window_size = (sliding_window, 0)``, which shows a query sliding_window earlier tokens and its own, while
its SDPA variant and its cache hold sliding_window tokens, the current one included. What a checkpoint was
trained with is the default. This project counts the current token (``ModelConfig.sliding_window``), and its
exports say the number of tokens in a key of their own, beside the published key for the published default.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

WINDOW_KEY = "attention_window"
"""Key of this project's exports: the tokens that a window layer sees, the current one included."""
_EARLIER_EXPORT_KEY = "full_attention_layers"
"""Exports without WINDOW_KEY but with this one are of this project; their sliding_window is inclusive."""


class WindowConvention(str, Enum):
    """How to read ``sliding_window`` where config.json does not say."""

    published = "published"
    """That many tokens before the current one, sliding_window + 1 in all, as the published default has it."""
    inclusive = "inclusive"
    """That many tokens with the current one, as the published SDPA variant and cache have it."""

    def window(self, sliding_window: int) -> int:
        """Tokens that a query sees, its own included."""
        return sliding_window + 1 if self is WindowConvention.published else sliding_window


def says_its_window(config: Mapping[str, Any]) -> bool:
    """Whether a gla_swa config.json leaves no doubt about its window."""
    return (
        config.get(WINDOW_KEY) is not None
        or _EARLIER_EXPORT_KEY in config
        or ("sliding_window" in config and config["sliding_window"] is None)
    )


def default_convention(config: Mapping[str, Any]) -> WindowConvention:
    """How ``sliding_window`` of a gla_swa config.json without WINDOW_KEY is read unless somebody chooses."""
    earlier_export = _EARLIER_EXPORT_KEY in config
    return WindowConvention.inclusive if earlier_export else WindowConvention.published
