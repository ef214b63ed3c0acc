"""The plug-in's mixing over requests, with an export's own op: each is computed as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikingbrain_train.hf.ops_gla_swa import gated_linear_attention
from vllm_spikingbrain.batch import Requests, mix_requests

H, G, K, SLOTS = 4, 2, 8, 5
TEXTS = {"a": 70, "b": 9, "c": 5, "d": 1}
"""Tokens of each request in all."""
SLOT = {"a": 3, "b": 1, "c": 4, "d": 1}
"""Request d comes when b has ended, and gets its slot."""
STEPS = (
    {"a": 40, "b": 6},
    {"b": 1, "a": 20, "c": 4},
    {"a": 1, "b": 1, "c": 1},
    {"b": 1, "a": 9},
    {"d": 1},
)
"""New tokens of the requests of each step; those with one come first, as vLLM orders them."""


def recurrence(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """Eq. 10-11 of arXiv 2509.05276, token by token, in float64: outputs [T, H, K]."""
    q, k, v, gate = q.double() * K**-0.5, k.double(), v.double(), log_gate.double().exp()
    state, outputs = torch.zeros(G, K, K, dtype=torch.float64), []
    for t in range(q.shape[0]):
        state = gate[t, :, :, None] * state + k[t, :, :, None] * v[t, :, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state.repeat_interleave(H // G, 0)))
    return torch.stack(outputs)


@pytest.fixture(scope="module")
def texts() -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """q, k, v and log gates of every request."""
    random = torch.Generator().manual_seed(0)

    def drawn(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, K, generator=random)

    return {
        name: (drawn(n, H).relu(), drawn(n, G).relu(), drawn(n, G), -drawn(n, G).exp() / 16)
        for name, n in TEXTS.items()
    }


def test_requests_of_any_mixture_of_lengths_are_computed_as_if_alone(texts) -> None:
    states = torch.full((SLOTS, G, K, K), torch.nan)  # whoever had the slots before
    read = dict.fromkeys(TEXTS, 0)
    got: dict[str, list[Tensor]] = {name: [] for name in TEXTS}
    for step in STEPS:
        parts = [[x[read[name] : read[name] + n] for x in texts[name]] for name, n in step.items()]
        q, k, v, log_gate = (torch.cat(columns) for columns in zip(*parts, strict=True))
        for name, n in step.items():
            read[name] += n
        of = Requests(
            torch.tensor([SLOT[name] for name in step], dtype=torch.int32),
            torch.tensor([0, *step.values()]).cumsum(0),
            torch.tensor([read[name] for name in step]),
            num_single=sum(n == 1 for n in step.values()),
            num_longer=sum(n > 1 for n in step.values()),
        )
        o = mix_requests(gated_linear_attention, q, k, v, log_gate, states, of)
        for name, output in zip(step, o.split(list(step.values())), strict=True):
            got[name].append(output)
    assert read == TEXTS
    for name, outputs in got.items():
        # float32 against float64: sums of up to 70 products of numbers around 1
        torch.testing.assert_close(
            torch.cat(outputs).double(), recurrence(*texts[name]), atol=2e-5, rtol=2e-5
        )
    assert states[0].isnan().all() and states[2].isnan().all(), "slots of nobody stay as they are"


def test_a_step_without_requests_has_no_outputs(texts) -> None:
    q, k, v, log_gate = (x[:0] for x in texts["a"])
    of = Requests(torch.empty(0, dtype=torch.int32), torch.tensor([0]), torch.empty(0), 0, 0)
    assert mix_requests(gated_linear_attention, q, k, v, log_gate, torch.zeros(1, G, K, K), of).shape == (
        0,
        H,
        K,
    )
