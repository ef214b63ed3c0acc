"""What softmax attention remembers between tokens: keys and values, all of them or those of a window."""

from __future__ import annotations

import torch
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
        self.num_sink_tokens = num_sink_tokens
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
        self._keep(k_B1GK, v_B1GV)
        return self._held()

    def extend(self, k_BTGK: Tensor, v_BTGV: Tensor) -> tuple[Tensor, Tensor]:
        """Add several tokens of text.

        Returns:
            Keys and values that they see: sinks, then text in its order, which ends with them.
        """
        if self._window is None:
            self._keep(k_BTGK, v_BTGV)
            return self._held()
        first = max(0, self._num_text_tokens - self._window + 1)
        slots = self._slots(first, self._num_text_tokens)
        sinks = self.num_sink_tokens
        seen_k, seen_v = (
            torch.cat((held[:, :sinks], held[:, slots], new), dim=1)
            for held, new in ((self._k, k_BTGK), (self._v, v_BTGV))
        )
        self._keep(k_BTGK, v_BTGV)
        return seen_k, seen_v

    def size(self) -> CacheSize:
        held = self._k.nbytes + self._v.nbytes
        if self._window is None:
            return CacheSize(unbounded=held)
        slots = self._k.shape[1]
        return CacheSize(windowed=held, windowed_limit=held // slots * (self.num_sink_tokens + self._window))

    def _held(self) -> tuple[Tensor, Tensor]:
        held = self.num_sink_tokens + min(self._num_text_tokens, self._room)
        return self._k[:, :held], self._v[:, :held]

    def _keep(self, k_BTGK: Tensor, v_BTGV: Tensor) -> None:
        end = self._num_text_tokens + k_BTGK.shape[1]
        if end > self._room:
            room = self._limited(max(2 * self._room, end))
            if room > self._room:
                self._grow(room)
        first = max(self._num_text_tokens, end - self._room)
        slots = self._slots(first, end)
        self._k.index_copy_(1, slots, k_BTGK[:, first - end :])
        self._v.index_copy_(1, slots, v_BTGV[:, first - end :])
        self._num_text_tokens = end

    def _slots(self, first: int, end: int) -> Tensor:
        """Where the text of these positions stands."""
        return self.num_sink_tokens + torch.arange(first, end, device=self._k.device) % self._room

    def _limited(self, room: int) -> int:
        return room if self._window is None else min(room, self._window)

    def _place(self, x_BSGD: Tensor, first: int) -> Tensor:
        """Room with sinks and the text from position ``first`` on, each token at its slot."""
        sinks, size = self.num_sink_tokens, (x_BSGD.shape[0], self.num_sink_tokens + self._room)
        placed = x_BSGD.new_empty(*size, *x_BSGD.shape[2:])
        placed[:, :sinks] = x_BSGD[:, :sinks]
        text = x_BSGD[:, sinks + first :]
        placed[:, sinks : sinks + text.shape[1]] = text.roll(first % self._room, dims=1) if first else text
        return placed

    def _grow(self, room: int) -> None:
        self._room = room
        self._k, self._v = (self._place(x, 0) for x in (self._k, self._v))
