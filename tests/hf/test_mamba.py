"""Mamba in the own format's model by itself: padding, documents, caches, and its scan.

That it computes what the Megatron model computes is held by tests/conversion/test_own_format.py.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from spikingbrain_train.hf.configuration_spikingbrain import SpikingBrainConfig
from spikingbrain_train.hf.modeling_spikingbrain import SpikingBrainForCausalLM, SpikingBrainMamba
from spikingbrain_train.ops.selective_scan import selective_scan

# One text in several orders of sums, float32, through three layers.
TOLERANCE = {"rtol": 0, "atol": 2e-4}
SETTINGS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 1024,
    "mixers": [["mamba"], ["mamba", "sliding_attention"], ["mamba"]],
    "feed_forwards": ["no_mlp", "mlp", "no_mlp"],
    "sliding_window": 7,
    "kinds": {"mamba": {"state_size": 5, "bc_dt_norm": True, "mixer_rms_eps": 1e-3}},
    "rms_norm_eps": 1e-3,
}


@pytest.fixture(params=[0, 5], ids=["no sinks", "sinks"])
def model(request: pytest.FixtureRequest) -> SpikingBrainForCausalLM:
    made = SpikingBrainForCausalLM(SpikingBrainConfig(**SETTINGS, num_sink_tokens=request.param))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1.0 + 0.3 * noise if "norm" in name else 0.25 * noise
    return made.eval()


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def logits(model: SpikingBrainForCausalLM, tokens: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **inputs).logits


def test_padding_anywhere_leaves_no_trace(model: SpikingBrainForCausalLM) -> None:
    """Two tokens in front, one inside, one behind: fewer than the convolution sees, and within its reach."""
    tokens, place = text(11), [2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13]
    row = text(15, seed=1)
    row[0, place] = tokens[0]
    mask = torch.zeros(1, 15, dtype=torch.int64)
    mask[0, place] = 1
    positions = torch.zeros(1, 15, dtype=torch.int64)
    positions[0, place] = torch.arange(11)
    padded = logits(model, row, attention_mask=mask, position_ids=positions, use_cache=True)
    torch.testing.assert_close(padded[:, place], logits(model, tokens), **TOLERANCE)


def test_a_text_goes_on_behind_padding(model: SpikingBrainForCausalLM) -> None:
    """A batch of two texts of which the shorter one is padded behind, then one token and more to each."""
    first, second = text(10), text(6, seed=1)
    whole = [logits(model, first), logits(model, second)]
    prompts = torch.cat((first[:, :7], torch.nn.functional.pad(second[:, :2], (0, 5))))
    mask = torch.tensor([[1] * 7, [1] * 2 + [0] * 5])
    with torch.no_grad():
        cache = model(prompts, attention_mask=mask, use_cache=True).past_key_values
    for step, new in enumerate((1, 2)):
        begin = (7 + step, 2 + step)
        tokens = torch.cat((first[:, begin[0] :][:, :new], second[:, begin[1] :][:, :new]))
        mask = torch.nn.functional.pad(mask, (0, new), value=1)
        positions = torch.stack([torch.arange(start, start + new) for start in begin])
        found = logits(model, tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        for row, start in enumerate(begin):
            torch.testing.assert_close(found[row], whole[row][0, start : start + new], **TOLERANCE)


def test_packed_documents_are_read_as_if_alone(model: SpikingBrainForCausalLM) -> None:
    documents = [text(length, seed=length) for length in (1, 9, 2, 6)]
    row = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).unsqueeze(0)
    packed = logits(model, row, position_ids=positions)
    alone = torch.cat([logits(model, document) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, **TOLERANCE)


def test_a_prompt_in_parts_is_the_prompt_at_once(model: SpikingBrainForCausalLM) -> None:
    tokens, cache, parts = text(40), None, []
    for part in tokens.split([1, 2, 30, 7], dim=1):
        with torch.no_grad():
            output = model(part, past_key_values=cache, use_cache=True)
        cache, size = output.past_key_values, output.past_key_values.layers[0].nbytes()
        parts.append(output.logits)
        assert size == 4 * (3 + 5) * 64  # the last inputs and the states, of 64 channels
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, tokens), **TOLERANCE)


def test_beams_keep_their_states(model: SpikingBrainForCausalLM) -> None:
    prompt = text(9)
    kept = model.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False)
    again = model.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(kept, again)


def test_a_new_model_begins_as_mamba_does_and_a_loaded_one_keeps_its_values(tmp_path: Any) -> None:
    made = SpikingBrainForCausalLM(SpikingBrainConfig(**SETTINGS))
    mixer = made.model.layers[0].self_attn
    torch.testing.assert_close(mixer.A_log.exp()[3], torch.arange(1.0, 6.0))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    torch.testing.assert_close(steps[[0, -1]], torch.tensor([0.001, 0.1]), rtol=1e-4, atol=0)
    with torch.no_grad():
        mixer.A_log.fill_(0.25), mixer.dt_proj.bias.fill_(0.5)
    made.save_pretrained(tmp_path)
    loaded = SpikingBrainForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn
    assert (loaded.A_log == 0.25).all() and (loaded.dt_proj.bias == 0.5).all()


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("strongest_step", [0.5, 50.0])
def test_scan_is_the_recurrence_with_gradients(length: int, strongest_step: float) -> None:
    torch.manual_seed(length)
    x, write, read = (torch.randn(2, length, size).double() for size in (4, 3, 3))
    dt = strongest_step * torch.rand(2, length, 4).double()
    A, state = -torch.arange(1, 4).double().repeat(4, 1), torch.randn(2, 4, 3).double()
    results = []
    for scan in ("own", "naive"):
        leaves = [each.clone().requires_grad_() for each in (x, dt, A, write, read, state)]
        if scan == "own":
            y, final = sys.modules[SpikingBrainMamba.__module__].selective_scan(*leaves)
        else:
            *tokens, begin = leaves
            y, found = selective_scan(*tokens, initial_state=begin, output_final_state=True, backend="naive")
            assert found is not None
            final = found
        loss = (y * torch.cos(torch.arange(y.numel()).view(y.shape))).sum() + final.square().sum()
        results.append([y.detach(), final.detach(), *torch.autograd.grad(loss, leaves)])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 1e-9 * exact.norm().clamp_min(1e-30)
