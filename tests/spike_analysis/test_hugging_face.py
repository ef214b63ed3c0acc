"""What of a Hugging Face model reads spikes, and that it is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.ops.spike_encoding import spike_counts, spike_encoding
from spikingbrain_train.spike_analysis.hugging_face import HuggingFaceSpikes
from spikingbrain_train.spike_analysis.linear_records import Linear

TOKENS = torch.arange(12).view(1, 12)


class SpikeEncoder(torch.nn.Module):
    """As exports carry one."""

    k = 5.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return spike_encoding(x, self.k)


class SpikingMLP(torch.nn.Module):
    """Spikes in front of gate and up projection, none in front of the down projection."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.spikes = SpikeEncoder()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.spikes(x)
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Tokenizer:
    path = Path("tokenizer")


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=32, num_hidden_layers=2, **sizes)).eval()


def spiking(model: PreTrainedModel) -> HuggingFaceSpikes:
    return HuggingFaceSpikes(model, Tokenizer(), "tiny")  # type: ignore[arg-type]


@torch.no_grad()
def test_every_projection_but_the_head_reads_spikes(model: Qwen2ForCausalLM) -> None:
    plain = model(TOKENS).logits
    seen: list[torch.Tensor] = []
    layer = model.model.layers[0]
    hook = layer.self_attn.q_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    subject = spiking(model)
    model(TOKENS)
    with subject.spikes(3.0) as records:
        changed = model(TOKENS).logits
    hook.remove()
    assert subject.k is None and not torch.equal(changed, plain)
    assert torch.equal(model(TOKENS).logits, plain)  # nothing is left behind
    assert {each.projection for each in records.linears} == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert {each.projection for each in records.shared} == {
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.up_proj",
    }
    counts, _ = spike_counts(seen[-1], 3.0)  # hooked first, it sees the input as it came
    record = records.linears[Linear(0, "self_attn.q_proj")]
    assert record.distribution.total == counts.numel()
    assert record.distribution.share_up_to(0) == pytest.approx(float((counts == 0).double().mean()))


@torch.no_grad()
def test_encoders_of_an_export_are_passed_by_and_say_what_is_counted(model: Qwen2ForCausalLM) -> None:
    plain = model(TOKENS).logits
    for layer in model.model.layers:
        layer.mlp = SpikingMLP(layer.mlp)
    trained = model(TOKENS).logits
    subject = spiking(model)
    assert subject.k == 5.0
    with subject.no_spikes():
        assert torch.equal(model(TOKENS).logits, plain)
    with subject.spikes(5.0) as records:
        torch.testing.assert_close(model(TOKENS).logits, trained)  # encoded once, not twice
    assert set(records.linears) == {
        Linear(layer, f"mlp.{name}_proj") for layer in (0, 1) for name in ("gate", "up")
    }
    assert torch.equal(model(TOKENS).logits, trained)


class SpikingExperts(torch.nn.Module):
    """Experts in one tensor, each written out; their inputs become spikes of k = 3, which are kept."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.counts: list[list[torch.Tensor]] = [[], []]

    def encoded(self, number: int, x: torch.Tensor) -> torch.Tensor:
        self.counts[number].append(spike_counts(x, 3.0)[0].flatten())
        return spike_encoding(x, 3.0)

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(x)
        for token, (chosen, share) in enumerate(zip(experts.tolist(), weights, strict=True)):
            for expert, weight in zip(chosen, share, strict=True):
                gate, up = (self.gate_up[expert] @ self.encoded(0, x[token])).chunk(2)
                hidden = self.encoded(1, torch.nn.functional.silu(gate) * up)
                output[token] += weight * (self.down[expert] @ hidden)
        return output


@pytest.fixture
def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, **heads}
    config = Qwen3MoeConfig(vocab_size=32, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, **sizes)
    return Qwen3MoeForCausalLM(config).eval()


@torch.no_grad()
def test_experts_in_one_tensor_read_spikes_and_are_counted(mixture: Qwen3MoeForCausalLM) -> None:
    experts: Any = mixture.model.layers[1].mlp.experts
    if not hasattr(experts, "gate_up_proj"):
        pytest.skip("transformers before 5 has a linear for every expert")
    plain, subject = mixture(TOKENS).logits, spiking(mixture)
    with subject.spikes(3.0) as records:
        ours = mixture(TOKENS).logits
    assert torch.equal(mixture(TOKENS).logits, plain)  # nothing is left behind
    for layer in mixture.model.layers:
        inside: Any = layer.mlp
        inside.experts = SpikingExperts(
            inside.experts.gate_up_proj.detach(), inside.experts.down_proj.detach()
        )
    written_out = spiking(mixture)  # which tries the model on some tokens
    for layer in mixture.model.layers:
        kept: Any = layer.mlp
        kept.experts.counts = [[], []]
    with written_out.spikes(3.0):
        torch.testing.assert_close(ours, mixture(TOKENS).logits, rtol=0, atol=1e-5)
    for number in (0, 1):
        kept = mixture.model.layers[number].mlp
        for name, counts in zip(("gate_up_proj", "down_proj"), kept.experts.counts, strict=True):
            record = records.linears[Linear(number, f"mlp.experts.{name}")]
            assert record.distribution.total == sum(each.numel() for each in counts)
            assert record.distribution.share_up_to(0) == pytest.approx(
                float((torch.cat(counts) == 0).double().mean())
            )


def test_experts_that_are_multiplied_otherwise_are_refused(mixture: Qwen3MoeForCausalLM) -> None:
    inside: Any = mixture.model.layers[0].mlp
    if not hasattr(inside.experts, "gate_up_proj"):
        pytest.skip("transformers before 5 has a linear for every expert")
    inside.experts.forward = lambda x, experts, weights: x @ inside.experts.gate_up_proj[0, :16]
    with pytest.raises(CheckpointError, match=r"tiny multiplies by mlp\.experts\.\w+ in a way that hides"):
        spiking(mixture)
