"""Generating with a recurrent state gives what reading the whole text anew would give, in constant memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast

from spikingbrain_train.hf.cache_gla_swa import GLAswaCache
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM
from tests.planning.live_bytes import LiveBytes

GREEDY = {"do_sample": False, "pad_token_id": 0}


def random_ids(*shape: int) -> Tensor:
    """Token ids other than 0: without a mask, generate() would take those for padding."""
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def greedy_by_rereading(model: GLAswaForCausalLM, ids: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_window": 100, "head_dim": 16},
        {"full_attention_layers": [3], "attention_window": 1},
        {
            **{"linear_qk_norm": True, "linear_rotary": True, "linear_num_key_value_heads": 4},
            **{"linear_output_gate": True, "linear_gate": "fixed"},
        },
    ],
    ids=["window 7", "window 100", "full and window 1", "options of linear layers"],
)
@torch.no_grad()
def test_one_token_at_a_time_equals_the_parallel_form(random_model: Callable, changes: dict) -> None:
    model = random_model(**changes)
    ids = random_ids(2, 512)
    cache, logits = None, []
    for t in range(512):
        outputs = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    parallel = model(ids).logits
    # The bound of the issue for fp32, over 512 tokens; logits are of size 5.
    assert (torch.cat(logits, dim=1) - parallel).abs().max() <= 1e-4


@torch.no_grad()
def test_a_text_may_be_read_in_pieces_of_any_size(random_model: Callable) -> None:
    model = random_model()
    ids = random_ids(1, 200)
    cache, logits = None, []
    for piece in ids.split([5, 1, 80, 3, 111], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, rtol=0, atol=1e-4)


def test_greedy_generation_equals_rereading(random_model: Callable) -> None:
    model = random_model()
    ids = random_ids(2, 33)
    assert torch.equal(model.generate(ids, max_new_tokens=25, **GREEDY), greedy_by_rereading(model, ids, 25))


def test_generation_ends_behind_a_stop_string(random_model: Callable) -> None:
    """transformers 5 hands the tokenizer on to the model, which has no use for it."""
    model, ids = random_model(), random_ids(1, 33)
    characters = tokenizers.Tokenizer(tokenizers.models.BPE({chr(33 + id): id for id in range(97)}, []))
    characters.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    whole = model.generate(ids, max_new_tokens=12, **GREEDY)
    fifth = whole[0, 33 + 4]
    end = 33 + whole[0, 33:].tolist().index(fifth) + 1
    stop = {"stop_strings": [chr(33 + int(fifth))], "tokenizer": tokenizer}
    assert torch.equal(model.generate(ids, max_new_tokens=12, **stop, **GREEDY), whole[:, :end])


def test_sampling_and_beam_search_do_not_depend_on_the_cache(random_model: Callable) -> None:
    model = random_model()
    ids = random_ids(2, 20)
    for settings in (
        {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    ):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(
                model.generate(ids, max_new_tokens=15, use_cache=use_cache, pad_token_id=0, **settings)
            )
        assert results[0].shape == (6, 35)
        assert torch.equal(*results)


def test_left_padded_batch_generates_what_each_text_alone_generates(random_model: Callable) -> None:
    model = random_model()
    texts = [random_ids(1, 41)[:, :length] for length in (41, 7, 23)]
    ids = torch.cat([torch.nn.functional.pad(text, (41 - text.shape[1], 0)) for text in texts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(t), (41 - t.shape[1], 0)) for t in texts])
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=30, **GREEDY)
    for row, text in zip(batch, texts, strict=True):
        alone = model.generate(text, max_new_tokens=30, **GREEDY)
        assert torch.equal(row[41:], alone[0, text.shape[1] :])


@torch.no_grad()
def test_padding_behind_a_prompt_does_not_decay_the_state(random_model: Callable) -> None:
    model = random_model(attn_layers=[])
    prompt, answer = random_ids(1, 20), random_ids(1, 10)
    expected = model(torch.cat([prompt, answer], dim=1)).logits[:, 20:]
    mask = torch.tensor([[1] * 20 + [0] * 15 + [1] * 10])
    padded = torch.nn.functional.pad(prompt, (0, 15))
    cache = model(padded, attention_mask=mask[:, :35], use_cache=True).past_key_values
    actual = model(answer, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)


@torch.no_grad()
def test_memory_of_the_cache_does_not_grow_with_the_text(random_model: Callable) -> None:
    model = random_model()
    # Two GLA layers: [1, 2 groups, 8, 8] float32 each; two windows: 6 keys and 6 values of 2 groups x 8 each.
    expected = 2 * (2 * 8 * 8) * 4 + 2 * (2 * 6 * 2 * 8) * 4
    cache = model(random_ids(1, 300), use_cache=True).past_key_values
    assert cache.nbytes() == expected
    for length in range(301, 340):
        model(random_ids(1, 1), past_key_values=cache)
        assert cache.nbytes() == expected
        assert cache.get_seq_length() == length


@torch.no_grad()
def test_conversation_continues_from_a_returned_cache(random_model: Callable) -> None:
    model = random_model()
    ids = random_ids(1, 12)
    first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    assert isinstance(first.past_key_values, GLAswaCache)
    turn = torch.cat([first.sequences, random_ids(1, 4)], dim=1)
    mask = torch.ones_like(turn)
    second = model.generate(
        turn, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=5, **GREEDY
    )
    assert torch.equal(second, greedy_by_rereading(model, turn, 5))


@torch.no_grad()
def test_rows_of_the_cache_can_be_reordered_repeated_and_reset(random_model: Callable) -> None:
    model = random_model()
    ids, following = random_ids(3, 20), random_ids(3, 1)
    expected = model(torch.cat([ids, following], dim=1)).logits[:, -1]

    def cache_after_prompt() -> GLAswaCache:
        return model(ids, use_cache=True).past_key_values

    order = torch.tensor([2, 0, 0])
    cache = cache_after_prompt()
    cache.reorder_cache(order)
    logits = model(following[order], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected[order], rtol=0, atol=1e-4)

    cache = cache_after_prompt()
    cache.batch_repeat_interleave(2)
    logits = model(following.repeat_interleave(2, dim=0), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected.repeat_interleave(2, dim=0), rtol=0, atol=1e-4)

    cache.reset()
    assert (cache.nbytes(), cache.get_seq_length()) == (0, 0)
    logits = model(torch.cat([ids, following], dim=1), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(NotImplementedError, match="cannot forget"):
        cache.crop(-1)


def test_a_key_value_cache_is_refused(random_model: Callable) -> None:
    with pytest.raises(ValueError, match="pass a GLAswaCache"):
        random_model().generate(random_ids(1, 5), past_key_values=DynamicCache(), max_new_tokens=2, **GREEDY)


def test_assisted_decoding_is_refused(random_model: Callable) -> None:
    model = random_model()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(random_ids(1, 5), assistant_model=random_model(), max_new_tokens=2, **GREEDY)


@torch.no_grad()
def test_a_hole_in_a_text_is_not_counted_by_windows(random_model: Callable) -> None:
    """In the whole text, in pieces, and token by token: as if the unattended tokens were not there.

    The published code takes them out. With equal positions for both, only rounding is left: 5e-5 on logits of
    size 5.
    """
    model = random_model()
    text = random_ids(1, 60)
    holes = {3: 1, 20: 9, 33: 2, 34: 30}  # before which token of the text, and how long
    ids, mask = [], []
    for index in range(60):
        ids += [5] * holes.get(index, 0) + [int(text[0, index])]
        mask += [0] * holes.get(index, 0) + [1]
    other = random_ids(1, len(ids))  # a row without holes beside it
    ids = torch.cat([torch.tensor([ids]), other])
    mask = torch.stack([torch.tensor(mask), torch.ones(len(mask), dtype=torch.long)])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    attended = mask[0].bool()
    expected = model(text).logits[0], model(other).logits[0]
    for sizes in ([ids.shape[1]], [22, 8, 1, 71], [1] * ids.shape[1]):
        cache, logits, read = None, [], 0
        for piece, position in zip(ids.split(sizes, dim=1), positions.split(sizes, dim=1), strict=True):
            read += piece.shape[1]
            outputs = model(
                piece,
                attention_mask=mask[:, :read],
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            logits.append(outputs.logits)
        both = torch.cat(logits, dim=1)
        torch.testing.assert_close(both[0, attended], expected[0], rtol=0, atol=5e-5)
        torch.testing.assert_close(both[1], expected[1], rtol=0, atol=5e-5)
        # What the window needs, not the hole of 30 tokens that has left it.
        assert cache.key_value_layer(1).k_BGSK.shape[2] == 6


@pytest.mark.parametrize("chunk_size", [1, 7, 500])
def test_a_prompt_may_be_prefilled_in_chunks(random_model: Callable, chunk_size: int) -> None:
    model = random_model()
    ids = random_ids(2, 33)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=9, **GREEDY)
    actual = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, prefill_chunk_size=chunk_size, **GREEDY
    )
    assert torch.equal(actual, expected)
    config = GenerationConfig(max_new_tokens=9, prefill_chunk_size=chunk_size, **GREEDY)
    assert torch.equal(model.generate(ids, config, attention_mask=mask), expected)


@pytest.mark.parametrize("masked", [True, False], ids=["mask of ones", "no mask"])
def test_a_piece_of_a_prompt_takes_the_memory_that_it_takes_of_a_short_one(
    random_model: Callable, masked: bool
) -> None:
    """To the byte: positions or masks of a prompt, kept beside its pieces, would be counted here."""
    model = random_model()

    def live_at_pieces(num_tokens: int) -> list[int]:
        found: list[int] = []
        handle = model.model.register_forward_pre_hook(lambda *_: found.append(memory.live))
        with LiveBytes() as memory:
            ids = random_ids(1, num_tokens)
            mask = torch.ones_like(ids) if masked else None
            given = memory.live
            model.generate(ids, attention_mask=mask, prefill_chunk_size=32, max_new_tokens=1, **GREEDY)
        handle.remove()
        return [live - given for live in found]

    short, long = live_at_pieces(4 * 32), live_at_pieces(16 * 32)
    assert len(short) == 4 and len(long) == 16
    assert long[3] == long[-1] == short[3] > 0


def test_a_prefill_that_cannot_be_is_refused(random_model: Callable) -> None:
    model = random_model()
    with pytest.raises(ValueError, match="prefill_chunk_size must be at least 1, got 0"):
        model.generate(random_ids(1, 5), prefill_chunk_size=0, max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="it needs use_cache=True"):
        model.generate(random_ids(1, 5), prefill_chunk_size=2, use_cache=False, max_new_tokens=2, **GREEDY)
