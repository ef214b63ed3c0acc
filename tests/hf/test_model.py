"""The whole model, its loss and its gradients, against a slow reference written token by token in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikingbrain_train.hf.configuration_gla_swa import GLAswaConfig

Tensors = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Pairs (i, i + d/2) as complex numbers, turned by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def reference_logits(config: GLAswaConfig, w: Tensors, ids: list[int]) -> Tensor:
    """Logits [T, vocab] of one text; every layer sees one token after the other, every head on its own."""
    hidden = [w["model.embeddings.weight"][i] for i in ids]
    d, heads = config.head_dim, config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        p = {n.removeprefix(f"model.layers.{layer}."): t for n, t in w.items() if f"layers.{layer}." in n}
        is_gla, full = layer not in config.attn_layers, layer in config.full_attention_layers
        groups = config.linear_num_key_value_heads if is_gla else config.num_key_value_heads
        states = [torch.zeros(d, d, dtype=torch.float64)] * groups
        past: list[tuple[Tensor, Tensor]] = []
        for t, x in enumerate(hidden):
            a = norm(x, p["attn_norm.weight"], config.norm_eps)
            q, k, v = (
                (p[f"attn.{n}_proj.weight"] @ a + p.get(f"attn.{n}_proj.bias", torch.zeros(()))).view(-1, d)
                for n in "qkv"
            )
            if config.qk_norm or (is_gla and config.linear_qk_norm):
                q = norm(q, p["attn.q_norm.weight"], config.norm_eps)
                k = norm(k, p["attn.k_norm.weight"], config.norm_eps)
            if is_gla:
                if config.linear_gate == "fixed":
                    decay = p["attn.log_decay"].exp()[:, None].expand(groups, d)
                else:
                    logit = p["attn.gk_proj.1.weight"] @ (p["attn.gk_proj.0.weight"] @ a)
                    logit = (logit + p["attn.gk_proj.1.bias"]).view(groups, d)
                    decay = logit.sigmoid() ** (1 / config.gate_logit_normalizer)
                q, k = q.clamp(min=0), k.clamp(min=0)
                if config.linear_rotary:
                    q, k = (rotate(x, t, config.rope_theta) for x in (q, k))
                states = [decay[g, :, None] * states[g] + torch.outer(k[g], v[g]) for g in range(groups)]
                mixed = [q[h] @ states[h * groups // heads] / math.sqrt(d) for h in range(heads)]
                mixed = [norm(o, p["attn.g_norm.weight"], config.norm_eps) for o in mixed]
            else:
                past.append((rotate(k, t, config.rope_theta), v))
                seen = past if full or config.attention_window is None else past[-config.attention_window :]
                keys, values = (torch.stack(x) for x in zip(*seen, strict=True))
                q = rotate(q, t, config.rope_theta)
                mixed = []
                for h in range(heads):
                    g = h * groups // heads
                    mixed.append((keys[:, g] @ q[h] / math.sqrt(d)).softmax(0) @ values[:, g])
            heads_of_token = torch.cat(mixed)
            if is_gla and config.linear_output_gate:
                gate = p["attn.g_proj.weight"] @ a + p["attn.g_proj.bias"]
                heads_of_token = heads_of_token * gate * gate.sigmoid()
            x = x + p["attn.o_proj.weight"] @ heads_of_token
            b = norm(x, p["mlp_norm.weight"], config.norm_eps)
            gate, up = p["mlp.gate_proj.weight"] @ b, p["mlp.up_proj.weight"] @ b
            hidden[t] = x + p["mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
    head = w.get("lm_head.weight", w["model.embeddings.weight"])
    return torch.stack([head @ norm(x, w["model.norm.weight"], config.norm_eps) for x in hidden])


VARIANTS = {
    "published": {},
    "llama, tied": {"attention_bias": False, "tie_word_embeddings": True},
    "qwen3": {"attention_bias": False, "qk_norm": True, "head_dim": 12, "rope_theta": 1e6},
    "options of linear layers": {
        "linear_qk_norm": True,
        "linear_rotary": True,
        "linear_num_key_value_heads": 4,
        "linear_output_gate": True,
    },
    "fixed decay": {"linear_gate": "fixed", "linear_num_key_value_heads": 4},
    "own layers": {"attn_layers": [0, 1, 3], "full_attention_layers": [3], "gate_low_rank_dim": 5},
    "no window": {"sliding_window": None, "gate_logit_normalizer": 4, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_gradients_equal_the_token_by_token_reference(
    random_model: Callable, changes: dict
) -> None:
    model = random_model(**changes).double()
    ids = torch.randint(97, (1, 27), generator=torch.Generator().manual_seed(1))
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    weights |= {n: b for n, b in model.named_buffers() if n.endswith("log_decay")}
    expected = reference_logits(model.config, weights, ids[0].tolist())
    expected_loss = F.cross_entropy(expected[:-1], ids[0, 1:])
    expected_loss.backward()

    outputs = model.train()(ids, labels=ids)
    outputs.loss.backward()
    # Rotary angles are float32 in the model: at position 27 they are off by about 1e-6.
    torch.testing.assert_close(outputs.logits[0], expected, rtol=0, atol=2e-5)
    # transformers computes the loss in float32.
    torch.testing.assert_close(outputs.loss.double(), expected_loss, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad
        assert gradient is not None and gradient.abs().max() > 0, name
        assert (parameter.grad - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max()), name


def test_gradient_checkpointing_changes_no_gradient(random_model: Callable) -> None:
    model = random_model().train()
    ids = torch.randint(97, (2, 40))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_training_lowers_the_loss_in_bfloat16_autocast(random_model: Callable) -> None:
    model = random_model(num_hidden_layers=2).train()
    ids = torch.randint(97, (4, 65), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # The same four random texts again and again: they are learned by heart.
    assert losses[-1] < 0.3 * losses[0], losses


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_no_logit_of_the_text(random_model: Callable, side: str) -> None:
    model = random_model()
    text = torch.randint(97, (1, 90), generator=torch.Generator().manual_seed(4))
    before, after = {"left": (70, 0), "right": (0, 70), "both": (33, 37)}[side]
    ids = torch.randint(97, (2, 160), generator=torch.Generator().manual_seed(5))
    ids[1, before : 160 - after] = text
    mask = torch.ones_like(ids)
    mask[1, :before] = 0
    mask[1, 160 - after :] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(padded[1:, before : 160 - after], model(text).logits, rtol=0, atol=5e-5)
        torch.testing.assert_close(padded[:1], model(ids[:1]).logits, rtol=0, atol=5e-5)


def test_labels_follow_the_shift_and_ignore_conventions(random_model: Callable) -> None:
    model = random_model()
    ids = torch.randint(97, (2, 30))
    labels = ids.clone()
    labels[:, :10] = -100
    outputs = model(ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, 9:-1].flatten(0, 1), ids[:, 10:].flatten())
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-6, atol=0)
    total = model(ids, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(total, expected * 40 / 7, rtol=1e-5, atol=0)


def test_optional_outputs(random_model: Callable) -> None:
    model = random_model()
    ids = torch.randint(97, (2, 12))
    outputs = model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 5
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, outputs.logits[:, -1:])
    torch.testing.assert_close(
        model(ids, logits_to_keep=torch.tensor([3, 5])).logits, outputs.logits[:, [3, 5]]
    )
    torch.testing.assert_close(model(ids, return_dict=False)[0], outputs.logits)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(embedded.logits, outputs.logits)


def test_inputs_that_contradict_each_other_are_refused(random_model: Callable) -> None:
    model = random_model()
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), expected \(1, 4\)"):
        model(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="pass a GLAswaCache"):
        model(ids, past_key_values=[])
    cache = model(ids, use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.train()(ids, past_key_values=cache)
