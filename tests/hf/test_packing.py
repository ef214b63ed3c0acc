"""Documents packed into one row compute what separate calls compute, gradients included.

Bound of every comparison: 1e-9 in float64. Rotary angles are float32, but a document has the same positions
alone and packed, so nothing of it remains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from spikingbrain_train.hf import ops_gla_swa as ops
from spikingbrain_train.hf.layout_gla_swa import TokenLayout
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM

LENGTHS = (15, 1, 90, 33)
TOLERANCE = 1e-9
VARIANTS = {
    "window 7": {},
    "window over the text": {"attention_window": 500},
    "options of linear layers": {
        **{"linear_qk_norm": True, "linear_rotary": True, "linear_num_key_value_heads": 4},
        **{"linear_output_gate": True, "linear_gate": "fixed"},
    },
    "full attention": {"full_attention_layers": [3], "qk_norm": True, "attention_bias": False},
}


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, 97, (1, length), generator=generator) for length in LENGTHS]


def collated(**settings: bool) -> dict[str, Any]:
    """What the collator of transformers makes of the documents."""
    return DataCollatorWithFlattening(return_tensors="pt", **settings)(
        [{"input_ids": ids[0].tolist()} for ids in documents()]
    )


def packed(form: str) -> dict[str, Any]:
    """The documents in one row, described in one of the ways that collators know."""
    if form == "position_ids":
        return collated()
    if form == "seq_idx":
        return collated(return_position_ids=False, return_seq_idx=True)
    if form == "everything":
        return collated(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collated(return_position_ids=False, return_flash_attn_kwargs=True)
    if form == "cu_seqlens":
        return {
            "input_ids": batch["input_ids"],
            "labels": batch["labels"],
            "cu_seqlens": batch["cu_seq_lens_q"],
        }
    return batch


def gradients(model: GLAswaForCausalLM) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_packed_documents_equal_separate_calls(random_model: Callable, changes: dict) -> None:
    model = random_model(**changes).double()
    alone = [model(ids).logits for ids in documents()]
    total = sum(
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        for logits, ids in zip(alone, documents(), strict=True)
    )
    total.backward()
    expected = gradients(model)
    for form in ("position_ids", "cu_seqlens", "cu_seq_lens_q", "seq_idx", "everything"):
        batch = packed(form)
        labels = batch.pop("labels")[0]
        outputs = model(**batch)
        assert outputs.past_key_values is None
        assert (outputs.logits - torch.cat(alone, dim=1)).abs().max() <= TOLERANCE, form
        torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[1:], reduction="sum").backward()
        for name, gradient in gradients(model).items():
            bound = TOLERANCE * max(1.0, expected[name].abs().max())
            assert (gradient - expected[name]).abs().max() <= bound, (form, name)


def test_training_with_a_packing_collator_and_gradient_checkpointing(random_model: Callable) -> None:
    model = random_model().train()
    batch = collated(return_flash_attn_kwargs=True, return_seq_idx=True)
    losses = [model(**batch).loss]
    model.gradient_checkpointing_enable()
    losses.append(model(**batch, num_items_in_batch=sum(LENGTHS) - len(LENGTHS)).loss)
    torch.testing.assert_close(*losses)
    losses[1].backward()
    assert model.model.embeddings.weight.grad.isfinite().all()


@torch.no_grad()
def test_rows_may_be_packed_differently_and_padded(random_model: Callable) -> None:
    model = random_model().double()
    a, b, c, d = documents()
    ids = torch.zeros(2, 130, dtype=torch.long)
    positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, start, text in ((0, 2, a), (0, 17, c), (0, 107, b), (1, 0, d), (1, 33, c)):
        span = slice(start, start + text.shape[1])
        ids[row, span], mask[row, span], positions[row, span] = text, 1, torch.arange(text.shape[1])
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, start, text in ((0, 2, a), (0, 17, c), (0, 107, b), (1, 0, d), (1, 33, c)):
        found = logits[row, start : start + text.shape[1]]
        assert (found - model(text).logits[0]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_positions_of_one_padded_text_begin_no_document(random_model: Callable) -> None:
    """As generate() counts them: from the mask, padding at 1; with an unattended token inside the text."""
    model = random_model().double()
    ids = torch.cat([torch.full((1, 5), 3), documents()[2]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    mask[:, 40] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    outputs = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    without = torch.cat([ids[:, 5:40], ids[:, 41:]], dim=1)
    expected = model(without).logits
    assert (outputs.logits[:, 41:] - expected[:, 35:]).abs().max() <= 1e-5  # float32 angles differ


def test_descriptions_that_contradict_each_other_are_refused(random_model: Callable) -> None:
    model = random_model()
    ids = documents()[0]
    positions = torch.tensor([[*range(7), *range(8)]])
    for sentence, given in (
        ("cu_seqlens and seq_idx describe different documents", {"cu_seqlens": [0, 7, 15]}),
        ("position_ids start again where seq_idx has no new document", {"position_ids": positions}),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(ids, **given, seq_idx=torch.tensor([[0] * 8 + [1] * 7]))
    for sentence, bounds in (
        ("cu_seq_lens_q must go from 0 to 15", [0, 7, 14]),
        ("cu_seq_lens_q must go from 0 to 15", [1, 7, 15]),
        ("cu_seq_lens_q must be a list of cumulative lengths", [0, 9, 7, 15]),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(ids, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens describes documents in one row, but the batch has 2"):
        model(ids.repeat(2, 1), cu_seqlens=torch.tensor([0, 7, 15]))
    with pytest.raises(ValueError, match=r"seq_idx has shape \(15,\), expected \(1, 15\)"):
        model(ids, seq_idx=torch.zeros(15))
    with pytest.raises(ValueError, match="attention_mask holds other numbers than 0 and 1"):
        model(ids, attention_mask=torch.tensor([[1] * 7 + [2] * 8]))


def test_documents_and_a_cache_are_refused_together(random_model: Callable) -> None:
    model = random_model()
    ids = documents()[0]
    positions = torch.tensor([[*range(7), *range(8)]])
    with pytest.raises(ValueError, match="cannot be remembered in a cache: pass use_cache=False"):
        model(ids, position_ids=positions, use_cache=True)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be remembered in a cache: pass use_cache=False"):
        model(ids, position_ids=positions + 15, past_key_values=cache)
    with pytest.raises(ValueError, match="start again at 0 behind the text in past_key_values"):
        model(ids, position_ids=torch.arange(15)[None], past_key_values=cache)


def test_a_keyword_without_meaning_does_not_vanish(random_model: Callable) -> None:
    model = random_model()
    ids = documents()[0]
    for name in ("cu_seqlens_q", "token_type_ids", "output_attentions"):
        with pytest.raises(TypeError, match=f"has no use for {name}: leave it out"):
            model(ids, **{name: torch.ones(1)})
    with pytest.raises(TypeError, match="has no use for num_items_in_batch"):
        model.model(ids, num_items_in_batch=3)
    model(ids, output_attentions=False, token_type_ids=None, cache_position=torch.arange(15))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_kernel_is_given_documents_as_one_row_of_sequences(rows: int) -> None:
    """A stand-in with fla's signature that knows cu_seqlens as fla documents it: a batch of one."""

    def chunk_gla(  # type: ignore[no-untyped-def]
        q, k, v, g, scale, initial_state, output_final_state, cu_seqlens
    ):
        assert q.shape[0] == 1 and initial_state is None and output_final_state
        outputs, states = [], []
        for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            parts = (x[:, first:last] for x in (q, k, v, g))
            o, state = ops.chunked_gated_linear_attention(*parts, None)
            outputs.append(o * scale)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(rows, 50, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 2)
    )
    g = -g.abs()
    starts = torch.rand(rows, 50, generator=generator) < 0.1
    starts[:, 0] = False
    expected = ops.gated_linear_attention(q, k, v, g, None, starts)
    actual = ops.gated_linear_attention_by_kernel(chunk_gla, q * 8**-0.5, k, v, g, None, starts)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_layout_of_a_batch_moves_with_a_layer_of_a_split_model() -> None:
    """device_map="auto": the hooks of accelerate move the arguments of a layer that can be moved."""
    send_to_device = pytest.importorskip("accelerate.utils").send_to_device
    valid = torch.tensor([[True, False, True]])
    layout = TokenLayout(
        valid, valid.cumsum(-1), num_cached=2, starts_BT=torch.tensor([[False, False, True]])
    )
    moved = send_to_device(layout, "meta")
    assert {x.device.type for x in (moved.valid_BS, moved.text_index_BS, moved.starts_BT)} == {"meta"}
    assert moved.num_cached == 2
    assert send_to_device(TokenLayout(num_cached=2), "meta") == TokenLayout(num_cached=2)
    assert layout.valid_BS is valid


class _MaskElsewhere(Tensor):
    """Remembers where it was moved to."""

    moved_to: list[object] = []

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        self.moved_to.append(args[0])
        return self.as_subclass(Tensor).to(*args, **kwargs)


def test_a_mask_is_moved_to_the_embeddings(random_model: Callable[..., GLAswaForCausalLM]) -> None:
    """A batch is often made on another device than the first layer's."""
    mask = torch.tensor([[0, 1, 1]]).as_subclass(_MaskElsewhere)
    with torch.no_grad():
        random_model()(torch.tensor([[1, 2, 3]]), attention_mask=mask)
    assert torch.device("cpu") in mask.moved_to
