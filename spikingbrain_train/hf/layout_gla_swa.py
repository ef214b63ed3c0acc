"""What the tokens of a batch are: text or padding, and of which document.

Part of the modelling code of a checkpoint (see modeling_gla_swa.py); needs torch only.

Shapes: B batch, T new tokens, S tokens in the cache and new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PACKING_KEYWORDS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""What packing collators pass beside position_ids."""


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of a forward pass belong together. Every layer reads the same one."""

    valid_BS: Tensor | None = None
    """bool, False where a token is padding; None means that all are text."""
    text_index_BS: Tensor | None = None
    """int64, text tokens up to each token, its own included, where padding stands inside a text: windows
    count text. None where counting all tokens gives the same windows."""
    num_cached: int | None = None
    """Tokens whose keys a window layer must remember for the next forward pass."""
    starts_BT: Tensor | None = None
    """bool, True where a document begins behind another one of its row; None means one document a row."""
    num_in_front: int = 0
    """Sinks in front of the new tokens, which all else here leaves out."""

    def valid_new(self, num_tokens: int) -> Tensor | None:
        """`valid_BS` of the last `num_tokens` tokens, sinks included, which are no padding."""
        if self.valid_BS is None:
            return None
        valid_BT = self.valid_BS[:, self.valid_BS.shape[1] - (num_tokens - self.num_in_front) :]
        return F.pad(valid_BT, (self.num_in_front, 0), value=True) if self.num_in_front else valid_BT

    def document_BT(self) -> Tensor | None:
        """Number of the document of each token in its row, int64, from 0; None where there is one a row."""
        return None if self.starts_BT is None else self.starts_BT.cumsum(-1)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> TokenLayout:
        """The same with its tensors on `device`.

        Hooks of a model split over devices (accelerate) call this before every layer.
        """

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return TokenLayout(
            moved(self.valid_BS),
            moved(self.text_index_BS),
            self.num_cached,
            moved(self.starts_BT),
            self.num_in_front,
        )


def token_layout(valid_BS: Tensor | None, window: int | None, starts_BT: Tensor | None) -> TokenLayout:
    """The layout of a batch.

    Args:
        valid_BS: as in `TokenLayout`.
        window: tokens that a window layer sees, the current one included; None if there is none.
        starts_BT: as in `TokenLayout`.
    """
    if window is None:
        return TokenLayout(valid_BS, starts_BT=starts_BT)
    text_index_BS, num_cached = None, window - 1
    if valid_BS is not None:
        text_index = valid_BS.cumsum(-1)
        behind_text = ~valid_BS & (text_index > 0)
        in_between = behind_text[:, :-1] & valid_BS[:, 1:]
        has_padding_behind_text, has_holes = torch.stack([behind_text.any(), in_between.any()]).tolist()
        if has_holes:
            text_index_BS = text_index
        if has_padding_behind_text:
            num_cached = _last_tokens_with_text(valid_BS, window - 1)
    return TokenLayout(valid_BS, text_index_BS, num_cached, starts_BT)


def _last_tokens_with_text(valid_BS: Tensor, number: int) -> int:
    """How many of the last tokens hold `number` tokens of text in every row, or all that a row has."""
    text_from_end = valid_BS.flip(-1).cumsum(-1)
    wanted = text_from_end[:, -1:].clamp(max=number)
    span = (text_from_end < wanted).sum(-1) + (wanted.squeeze(-1) > 0)
    return int(span.max())


def valid_tokens(attention_mask: Tensor | None, batch_size: int, num_tokens: int) -> Tensor | None:
    """`TokenLayout.valid_BS` of an attention mask; None if nothing is padding.

    Raises:
        ValueError: another shape than [B, S], or other numbers than 0 and 1.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, num_tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch_size, num_tokens)}: "
            "one entry for every token, those in the cache included."
        )
    valid_BS = attention_mask.bool()
    # Compared as they are: a copy in int64 would be the largest tensor of a piece of a very long prompt.
    if not bool((valid_BS == attention_mask).all()):
        raise ValueError(
            "attention_mask holds other numbers than 0 and 1: pass the number of each token's document as "
            "seq_idx."
        )
    return None if bool(valid_BS.all()) else valid_BS


def document_starts(
    packing: dict,
    position_ids: Tensor | None,
    valid_BS: Tensor | None,
    shape: tuple[int, int],
    num_past: int,
) -> Tensor | None:
    """`TokenLayout.starts_BT` of new tokens, from whatever describes documents; None if nothing begins.

    Args:
        packing: those of `PACKING_KEYWORDS` that were given.
        position_ids: [B or 1, T] or None.
        valid_BS: as in `TokenLayout`.
        shape: B and T.
        num_past: tokens in the cache.

    Raises:
        ValueError: descriptions that contradict each other, or a document that begins behind a cached text.
    """
    batch_size, num_new = shape
    valid_BT = None if valid_BS is None else valid_BS[:, num_past:]
    found: dict[str, Tensor] = {}
    for name, value in packing.items():
        found[name] = (
            _starts_of_indices(value, batch_size, num_new)
            if name == "seq_idx"
            else _starts_of_lengths(name, value, batch_size, num_new)
        )
    restarts = None
    if position_ids is not None:
        restarts = _restarts_of_positions(position_ids, valid_BT)
        if num_past > 0 and _starts_behind_cached_text(position_ids, valid_BS, num_past):
            raise ValueError(
                "position_ids start again at 0 behind the text in past_key_values: begin another document "
                "without a cache."
            )
    if found:
        (name, starts_BT), *others = found.items()
        for other_name, other in others:
            if not torch.equal(starts_BT, other):
                raise ValueError(f"{name} and {other_name} describe different documents.")
        if restarts is not None and bool((restarts & ~starts_BT).any()):
            raise ValueError(f"position_ids start again where {name} has no new document.")
    elif restarts is not None:
        starts_BT = restarts
    else:
        return None
    return starts_BT if bool(starts_BT.any()) else None


def positions_in_documents(starts_BT: Tensor) -> Tensor:
    """Position of each token in its document, int64 [B, T]."""
    index = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return index - torch.where(starts_BT, index, 0).cummax(-1).values


def _starts_behind_cached_text(position_ids: Tensor, valid_BS: Tensor | None, num_past: int) -> bool:
    at_zero = position_ids[:, 0] == 0
    if valid_BS is not None:
        at_zero = at_zero & valid_BS[:, num_past] & valid_BS[:, :num_past].any(-1)
    return bool(at_zero.any())


def _restarts_of_positions(position_ids: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Where a text token's position is not above that of the text token before it, bool [B or 1, T].

    That is how packing collators mark the first token of a document.
    """
    if valid_BT is None:
        return F.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0))
    index = torch.arange(valid_BT.shape[1], device=valid_BT.device)
    last_text = torch.where(valid_BT, index, -1).cummax(-1).values
    before = F.pad(last_text[:, :-1], (1, 0), value=-1)
    position_ids = position_ids.expand_as(valid_BT)
    position_before = position_ids.gather(-1, before.clamp(min=0))
    return valid_BT & (before >= 0) & (position_ids <= position_before)


def _starts_of_lengths(name: str, cumulative_lengths: Tensor, batch_size: int, num_tokens: int) -> Tensor:
    """`TokenLayout.starts_BT` of cumulative lengths [N + 1], such as `cu_seqlens`.

    Raises:
        ValueError: they do not describe one row of `num_tokens` tokens; the message uses `name`.
    """
    bounds = cumulative_lengths.tolist()
    if batch_size != 1:
        raise ValueError(f"{name} describes documents in one row, but the batch has {batch_size} rows.")
    if not isinstance(bounds, list) or not bounds or bounds != sorted(bounds):
        raise ValueError(f"{name} must be a list of cumulative lengths from 0 to {num_tokens}, got {bounds}.")
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(
            f"{name} must go from 0 to {num_tokens}, the number of tokens; it goes from {bounds[0]} to "
            f"{bounds[-1]}."
        )
    starts = torch.zeros(1, num_tokens, dtype=torch.bool, device=cumulative_lengths.device)
    starts[0, [bound for bound in bounds if 0 < bound < num_tokens]] = True
    return starts


def _starts_of_indices(seq_idx: Tensor, batch_size: int, num_tokens: int) -> Tensor:
    """`TokenLayout.starts_BT` of the number of each token's document, [B, T].

    Raises:
        ValueError: another shape.
    """
    if seq_idx.shape != (batch_size, num_tokens):
        raise ValueError(
            f"seq_idx has shape {tuple(seq_idx.shape)}, expected {(batch_size, num_tokens)}: the number of "
            "each token's document."
        )
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
