"""What softmax attention remembers between tokens: keys and values, all of them or those of a window."""

from __future__ import annotations

from torch import Tensor

from spikingbrain_train.models.mixers.decoding import CacheSize, DecodingState

_FIRST_ROOM = 64
"""Tokens of text that there is room for at first, at least."""


class KeyValues(DecodingState):
    """Keys, rotated at their positions, and values: sinks first, then text.

    Room for text doubles when it is full, up to the window. From then on it is a ring: the newest token takes
    the place of the one that has left the window, and what is held stays the same for ever. The order of keys
    means nothing to attention.

    Args:
        k_BSGK: [B, sinks + T, G, K] keys of the beginning of a text.
        v_BSGV: [B, sinks + T, G, V] values.
        num_sink_tokens: sinks, which every token sees.
        window: tokens of text that a token sees, itself included; None for all.
    """

    def __init__(self, k_BSGK: Tensor, v_BSGV: Tensor, *, num_sink_tokens: int, window: int | None) -> None:
        self._num_sink_tokens = num_sink_tokens
        self._window = window
        self._num_text_tokens = k_BSGK.shape[1] - num_sink_tokens
        self._room = self._limited(max(_FIRST_ROOM, self._num_text_tokens))
        first = max(0, self._num_text_tokens - self._room)
        self._k, self._v = (self._place(x, first) for x in (k_BSGK, v_BSGV))

    def append(self, k_B1GK: Tensor, v_B1GV: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token of text.

        Returns:
            Views of the keys and values that it sees, in no particular order.
        """
        if self._num_text_tokens == self._room and self._limited(2 * self._room) > self._room:
            self._grow()
        slot = self._num_sink_tokens + self._num_text_tokens % self._room
        self._k[:, slot] = k_B1GK[:, 0]
        self._v[:, slot] = v_B1GV[:, 0]
        self._num_text_tokens += 1
        held = self._num_sink_tokens + min(self._num_text_tokens, self._room)
        return self._k[:, :held], self._v[:, :held]

    def size(self) -> CacheSize:
        held = self._k.nbytes + self._v.nbytes
        if self._window is None:
            return CacheSize(unbounded=held)
        slots = self._k.shape[1]
        return CacheSize(windowed=held, windowed_limit=held // slots * (self._num_sink_tokens + self._window))

    def _limited(self, room: int) -> int:
        return room if self._window is None else min(room, self._window)

    def _place(self, x_BSGD: Tensor, first: int) -> Tensor:
        """Room with sinks and the text from position ``first`` on, each token at its slot."""
        sinks, size = self._num_sink_tokens, (x_BSGD.shape[0], self._num_sink_tokens + self._room)
        placed = x_BSGD.new_empty(*size, *x_BSGD.shape[2:])
        placed[:, :sinks] = x_BSGD[:, :sinks]
        text = x_BSGD[:, sinks + first :]
        placed[:, sinks : sinks + text.shape[1]] = text.roll(first % self._room, dims=1) if first else text
        return placed

    def _grow(self) -> None:
        self._room = self._limited(2 * self._room)
        self._k, self._v = (self._place(x, 0) for x in (self._k, self._v))
