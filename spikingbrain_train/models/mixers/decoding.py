"""Text piece by piece: what a mixer remembers between pieces, and how it reads the next one.

Pieces are single tokens where text is generated, and many tokens where a long prompt is read. A mixer that
has :class:`DecodesByStep`'s two methods is asked for them. Any other reads its whole input again for every
piece, which gives the same output and takes time and memory that grow with the text.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.sequence_layout import SequenceLayout


@dataclass(frozen=True)
class CacheSize:
    """Bytes that a model keeps between tokens."""

    recurrent: int = 0
    """In recurrent states: the same for every length of text."""
    windowed: int = 0
    """In keys and values of sliding windows."""
    windowed_limit: int = 0
    """What ``windowed`` grows to, once the text is longer than the windows."""
    unbounded: int = 0
    """In keys and values, or inputs, that grow with every token."""

    def __add__(self, other: CacheSize) -> CacheSize:
        return CacheSize(
            *(mine + theirs for mine, theirs in zip(self.numbers(), other.numbers(), strict=True))
        )

    def numbers(self) -> tuple[int, ...]:
        """All of them, in order."""
        return self.recurrent, self.windowed, self.windowed_limit, self.unbounded

    def describe(self) -> str:
        """One phrase, in megabytes."""
        parts = []
        if self.recurrent:
            parts.append(f"{self.recurrent / 1e6:.2f} MB in recurrent states, whatever the length")
        if self.windowed:
            parts.append(
                f"{self.windowed / 1e6:.2f} MB in windows, never above {self.windowed_limit / 1e6:.1f} MB"
            )
        if self.unbounded:
            parts.append(f"{self.unbounded / 1e6:.2f} MB in keys and values, growing with every token")
        return "; ".join(parts) or "empty"


class DecodingState(ABC):
    """What one mixer remembers of the text that it has read."""

    @abstractmethod
    def size(self) -> CacheSize:
        """Its memory."""


@runtime_checkable
class DecodesByStep(Protocol):
    """A mixer that reads a text once, and whatever follows by itself.

    No sequence parallelism and no documents. Tensor-parallel ranks keep the states of their own heads, as
    they have their own heads in :meth:`forward`.

    A class whose :meth:`decode` also has a parameter ``cp_group`` (ProcessGroup or None) reads slices: with a
    group the tokens are this rank's slice of a piece that its ranks read together. Every rank has the state
    of the whole text so far, and has it again behind the piece.
    """

    def begin_decoding(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, layout: SequenceLayout
    ) -> tuple[Tensor, DecodingState]:
        """Read the beginning of a text.

        Args:
            hidden_states: [T, B, hidden_size] normed input, ``layout.num_sink_tokens`` sinks first.
            rotary_pos_emb: [T, 1, 1, kv_channels] rotary angles.
            layout: one document a row, all of it here, on every context-parallel rank.

        Returns:
            What :meth:`forward` gives for it, with a bias added if it has one, and the state behind it.
        """
        ...

    def decode(self, hidden_states: Tensor, state: DecodingState, *, rotary_pos_emb: Tensor | None) -> Tensor:
        """Read one or more tokens and bring the state up to them.

        Args:
            hidden_states: [T, B, hidden_size] normed input.
            state: of :meth:`begin_decoding`; changed in place.
            rotary_pos_emb: [T, 1, 1, kv_channels] rotary angles at the tokens' positions.

        Returns:
            [T, B, hidden_size]: what :meth:`forward` gives for the last tokens of the whole text.
        """
        ...


def decodes_by_step(mixer_class: type) -> bool:
    """Whether a mixer's class brings its own decoding step.

    A subclass that mixes otherwise than the class whose step it inherits does not.
    """
    if not issubclass(mixer_class, DecodesByStep):
        return False
    classes = mixer_class.__mro__
    step = next(index for index, each in enumerate(classes) if "decode" in vars(each))
    return not any(name in vars(each) for each in classes[:step] for name in ("forward", "normed_heads"))


def decodes_in_slices(mixer_class: type) -> bool:
    """Whether its decoding step takes the slices of context-parallel ranks: it has a ``cp_group``."""
    if not decodes_by_step(mixer_class):
        return False
    decode: Any = vars(next(each for each in mixer_class.__mro__ if "decode" in vars(each)))["decode"]
    return "cp_group" in inspect.signature(decode).parameters


class _InputsSoFar(DecodingState):
    """All that a mixer without a step has been given."""

    def __init__(self, hidden_states: Tensor, rotary_pos_emb: Tensor | None, num_sink_tokens: int) -> None:
        self.hidden_states = hidden_states
        self.rotary_pos_emb = rotary_pos_emb
        self.num_sink_tokens = num_sink_tokens

    def append(self, hidden_states: Tensor, rotary_pos_emb: Tensor | None) -> None:
        self.hidden_states = torch.cat((self.hidden_states, hidden_states))
        if self.rotary_pos_emb is not None and rotary_pos_emb is not None:
            self.rotary_pos_emb = torch.cat((self.rotary_pos_emb, rotary_pos_emb))

    def size(self) -> CacheSize:
        return CacheSize(unbounded=self.hidden_states.nbytes)


def begin_decoding(
    mixer: torch.nn.Module, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, layout: SequenceLayout
) -> tuple[Tensor, DecodingState]:
    """:meth:`DecodesByStep.begin_decoding` of any mixer."""
    if decodes_by_step(type(mixer)):
        assert isinstance(mixer, DecodesByStep)
        return mixer.begin_decoding(hidden_states, rotary_pos_emb=rotary_pos_emb, layout=layout)
    state = _InputsSoFar(hidden_states, rotary_pos_emb, layout.num_sink_tokens)
    return _forward(mixer, state), state


def decode(
    mixer: torch.nn.Module,
    hidden_states: Tensor,
    state: DecodingState,
    *,
    rotary_pos_emb: Tensor | None,
    cp_group: ProcessGroup | None = None,
) -> Tensor:
    """:meth:`DecodesByStep.decode` of any mixer; with ``cp_group`` of one that decodes in slices."""
    if cp_group is not None:
        assert decodes_in_slices(type(mixer)), f"{type(mixer).__name__} has whole texts alone"
        sliced: Any = mixer
        output: Tensor = sliced.decode(hidden_states, state, rotary_pos_emb=rotary_pos_emb, cp_group=cp_group)
        return output
    if not isinstance(state, _InputsSoFar):
        assert isinstance(mixer, DecodesByStep)
        return mixer.decode(hidden_states, state, rotary_pos_emb=rotary_pos_emb)
    state.append(hidden_states, rotary_pos_emb)
    return _forward(mixer, state)[-len(hidden_states) :]


def _forward(mixer: torch.nn.Module, inputs: _InputsSoFar) -> Tensor:
    layout = SequenceLayout(len(inputs.hidden_states) - inputs.num_sink_tokens, inputs.num_sink_tokens)
    output, bias = mixer(
        inputs.hidden_states,
        attention_mask=None,
        rotary_pos_emb=inputs.rotary_pos_emb,
        packed_seq_params=layout,
    )
    return output if bias is None else output + bias
