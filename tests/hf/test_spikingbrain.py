"""The own format's model by itself: padding, documents, caches, training, and folders that stand alone.

That it computes what the Megatron model computes is held by tests/conversion/test_own_format.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.conversion.export_code import code_of_export
from spikingbrain_train.hf import SPIKINGBRAIN_CODE
from spikingbrain_train.hf.configuration_spikingbrain import SpikingBrainConfig
from spikingbrain_train.hf.kinds_spikingbrain import MIXERS as MODEL_MIXERS
from spikingbrain_train.hf.kinds_spikingbrain import Mixer, Place, StateLayer
from spikingbrain_train.hf.modeling_spikingbrain import SpikingBrainForCausalLM
from tests.hf.test_exported_folder import check_that_a_folder_stands_alone

SETTINGS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 1024,
    "mixers": [
        ["sliding_attention", "linear_attention"],
        ["linear_attention"],
        ["full_attention", "sliding_attention", "linear_attention"],
    ],
    "feed_forwards": ["mlp", "moe", "moe"],
    "sliding_window": 7,
    "linear_attention": {"feature_map": "sigmoid", "gate": "tied", "rotary": True, "output_gate": True},
    "moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "num_sink_tokens": 5,
    "attention_bias": True,
    # An epsilon that keeps a norm behind few sinks from enlarging differences of summation.
    "rms_norm_eps": 1e-3,
}
SPIKES = {"projections": ["qkv", "gate", "attention_output", "mlp_fc1", "mlp_fc2"], "k": 3.0}


def random_model(**changes: Any) -> SpikingBrainForCausalLM:
    """A model whose every tensor is far from its default, so that a missing one shows in the logits."""
    model = SpikingBrainForCausalLM(SpikingBrainConfig(**{**SETTINGS, **changes}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1.0 + 0.3 * noise if "norm" in name else 0.25 * noise
    return model.eval()


@pytest.fixture(scope="module")
def model() -> SpikingBrainForCausalLM:
    return random_model()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_padding_anywhere_changes_nothing(model: SpikingBrainForCausalLM) -> None:
    text = tokens(1, 12)
    expected = model(text).logits[0]
    for places in (range(4, 16), range(12), [0, 1, *range(5, 15)]):
        ids, mask = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64)
        ids[0, list(places)], mask[0, list(places)] = text[0], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits[0, list(places)]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_one_token_at_a_time_and_in_pieces_equals_reading_at_once(model: SpikingBrainForCausalLM) -> None:
    text = tokens(2, 20)
    expected = model(text).logits
    for sizes in ([1] * 20, [9, 1, 6, 4]):
        cache, logits, start = None, [], 0
        for size in sizes:
            output = model(text[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, start + size
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=2e-5)
    assert cache is not None
    cache.reorder_cache(torch.tensor([1, 1]))
    after = model(tokens(2, 1), past_key_values=cache, use_cache=True).logits
    both = torch.cat([text[1:].expand(2, -1), tokens(2, 1)], dim=1)
    torch.testing.assert_close(after[:, -1], model(both).logits[:, -1], rtol=0, atol=2e-5)


def test_documents_of_a_row_are_separate_texts_in_values_and_gradients(
    model: SpikingBrainForCausalLM,
) -> None:
    text, bounds = tokens(1, 21), (0, 8, 9, 21)
    packed = model(text, cu_seqlens=torch.tensor(bounds)).logits
    parts = [model(text[:, a:b]).logits for a, b in zip(bounds, bounds[1:], strict=False)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=0, atol=2e-5)
    ours, theirs = (
        torch.autograd.grad(logits.square().mean(), list(model.parameters()), allow_unused=True)
        for logits in (packed, torch.cat(parts, dim=1))
    )
    for name, a, b in zip(dict(model.named_parameters()), ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert (a - b).norm() <= 1e-3 * b.norm(), name


def test_gradient_checkpointing_changes_no_gradient_and_spikes_let_them_pass() -> None:
    text, found = tokens(2, 15), []
    for checkpointing in (False, True):
        model = random_model(spiking=SPIKES).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(text, labels=text).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*found, strict=True):
        assert plain is not None and plain.abs().sum() > 0
        torch.testing.assert_close(again, plain)


def test_spikes_are_what_the_projections_read() -> None:
    """`spiking` null computes without them, and another k gives other logits."""
    text = tokens(1, 9)
    with torch.no_grad():
        plain, fine, coarse = (
            random_model(spiking=spiking).forward(text).logits
            for spiking in (None, SPIKES | {"k": 1e5}, SPIKES)
        )
    torch.testing.assert_close(fine, plain, rtol=0, atol=1e-2)
    assert (coarse - plain).abs().max() > 0.1


class TokenShift(nn.Module):
    """A mixer with states of its own: a projection of a token, the one before it, and the sum of all."""

    def __init__(self, config: SpikingBrainConfig, place: Place) -> None:
        super().__init__()
        self.cache_idx = place.cache_idx
        self.o_proj = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, rotary: object, layout: object, cache: Any) -> Tensor:
        states = {} if cache is None else cache.layers[self.cache_idx].states
        last_BD, sum_BD = (states.get(name, torch.zeros_like(x_BTD[:, 0])) for name in ("last", "sum"))
        before_BTD = torch.cat([last_BD.unsqueeze(1), x_BTD[:, :-1]], dim=1)
        sums_BTD = x_BTD.cumsum(1) + sum_BD.unsqueeze(1)
        if cache is not None:
            cache.layers[self.cache_idx].states = {"last": x_BTD[:, -1], "sum": sums_BTD[:, -1]}
        return self.o_proj(torch.cat([x_BTD, before_BTD, sums_BTD], dim=-1))


@torch.no_grad()
def test_states_of_a_kinds_own_are_remembered_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Mixer("token_shift", TokenShift, cache_layer=lambda config: StateLayer())
    monkeypatch.setitem(MODEL_MIXERS._kinds, kind.name, kind)
    mixers = [["token_shift"], ["token_shift", "sliding_attention"], ["linear_attention"]]
    model = random_model(mixers=mixers, num_sink_tokens=0)
    text, following = tokens(3, 20), tokens(3, 21)[:, 20:]
    expected = model(torch.cat([text, following], dim=1)).logits

    cache = model(text[:, :9], use_cache=True).past_key_values
    logits = model(text[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, 9:20], rtol=0, atol=2e-5)
    assert cache.nbytes() > 0
    for rows, change in (
        (torch.tensor([2, 0, 0]), lambda cache, rows: cache.reorder_cache(rows)),
        (torch.tensor([0, 0, 1, 1, 2, 2]), lambda cache, rows: cache.batch_repeat_interleave(2)),
    ):
        cache = model(text, use_cache=True).past_key_values
        change(cache, rows)
        logits = model(following[rows], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, expected[rows, -1], rtol=0, atol=2e-5)
    cache.reset()
    assert (cache.nbytes(), cache.get_seq_length()) == (0, 0)
    beams = model.generate(text, num_beams=3, max_new_tokens=6, do_sample=False, pad_token_id=0)
    without = model.generate(
        text, num_beams=3, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(beams, without)


def test_lora_attaches_by_the_ordinary_names(model: SpikingBrainForCausalLM) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "gate_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(random_model(), config)
    text = tokens(2, 9)
    torch.testing.assert_close(adapted(input_ids=text).logits, model(text).logits)
    adapted(input_ids=text, labels=text).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained and all("lora" in name for name in trained)
    assert any("experts.0.gate_proj" in name for name in trained)
    adapted.merge_and_unload().generate(text, max_new_tokens=3, do_sample=False, pad_token_id=0)


def export(model: SpikingBrainForCausalLM, folder: Path, *, feed_forwards: list[str]) -> None:
    """What the exporter does: tensors, config with auto_map, the code of the model's kinds."""
    model.config.architectures = SPIKINGBRAIN_CODE.architectures
    model.config.auto_map = SPIKINGBRAIN_CODE.auto_map
    model.save_pretrained(folder)
    kinds = [MIXERS["gla"], MIXERS["swa"], *(FEED_FORWARDS[name] for name in feed_forwards)]
    for name, text in code_of_export(SPIKINGBRAIN_CODE, kinds).items():
        (folder / name).write_text(text)


@pytest.mark.slow
def test_folder_loads_computes_generates_and_trains_on_its_own(tmp_path: Path) -> None:
    model = random_model(spiking=SPIKES, tie_word_embeddings=True)
    export(model, tmp_path / "export", feed_forwards=["dense", "moe"])
    check_that_a_folder_stands_alone(model, tmp_path / "export", SPIKINGBRAIN_CODE, tmp_path)


def test_folders_of_one_name_are_loaded_each_with_its_own_code(tmp_path: Path) -> None:
    """transformers keeps the model class of the first one, for each class of configurations."""
    feed_forwards = {"dense": ["mlp"] * 3, "experts": ["moe"] * 3}
    for folder, listed in feed_forwards.items():
        model = random_model(feed_forwards=listed)
        kinds = ["dense" if name == "mlp" else name for name in dict.fromkeys(listed)]
        export(model, tmp_path / folder / "of_one_name", feed_forwards=kinds)
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder / "of_one_name", trust_remote_code=True, dtype=torch.float32
        )
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.eval()(tokens(1, 9)).logits, model(tokens(1, 9)).logits, rtol=0, atol=1e-6
            )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"linear_attention": {"num_key_value_heads": 3}}, "num_key_value_heads of linear_attention 3"),
        ({"linear_attention": {"gate": "tied"}}, "needs feature_map sigmoid"),
        (
            {"linear_attention": {"gate": "open"}},
            'knows no "open"; known are low_rank, full_rank, tied, fixed',
        ),
        ({"linear_attention": {"window": 3}}, "linear_attention knows no window; it has feature_map"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"mixers": [["linear_attention"]]}, "mixers lists 1 layers, but num_hidden_layers is 3"),
        ({"mixers": [["gla"]] * 3}, 'mixers knows no "gla"; known are gdn, linear_attention'),
        ({"mixers": [[]] * 3}, "name each of its mixers once"),
        ({"feed_forwards": ["dense"] * 3}, 'feed_forwards knows no "dense"; known are mlp, moe'),
        ({"linear_transforms": [{"name": "int3", "linears": {}}]}, 'linear_transforms knows no "int3"'),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "num_experts_per_tok 3 of moe is above"),
        ({"spiking": {"k": 3.0}}, 'spiking needs "projections" and a "k" above 0'),
        ({"spiking": {"k": 3.0, "projections": ["lm_head"]}}, "spiking knows no lm_head"),
        ({"rope_parameters": {"rope_type": "other"}}, 'rope_type "other" is not supported'),
    ],
)
def test_settings_that_cannot_be_computed_are_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SpikingBrainForCausalLM(SpikingBrainConfig(**{**SETTINGS, **changes}))
