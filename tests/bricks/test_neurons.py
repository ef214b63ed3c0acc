"""spikingbrain-bricks neurons on one model in all of its forms and over ranks.

In float32: which of two nearly equal neurons is the weaker one is decided by rounding, so curves of forms and
topologies agree to 1e-4 nats where the whole model agrees to 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikingbrain_train.bricks.neuron_records import Histogram
from tests.bricks.models import bricks, save_models
from tests.distributed.pool import RankPool

TOKENS, LENGTH, WIDTH = 64, 32, 48
MASKED = (0, 30, 50, 90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`tests.bricks.models.save_models`."""
    folder = tmp_path_factory.mktemp("bricks")
    save_models(folder)
    return folder


def neurons(
    ranks: RankPool, folder: Path, model: str, *more: str, world_size: int = 1
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    output = folder / f"out_{model}_{len(more)}_{world_size}"
    words = ["neurons", "--model", str(folder / model), "--text", str(folder / "text.txt")]
    words += ["--output", str(output), "--seq-length", str(LENGTH), "--windows", str(TOKENS // LENGTH)]
    words += ["--trust-remote-code", "--mask", *map(str, MASKED), *more]
    ranks.run(bricks, *words, world_size=world_size)
    assert (output / "neurons.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((output / "neurons.json").read_text()), load_file(output / "neurons.safetensors")


@pytest.fixture(scope="module")
def of_experts(ranks: RankPool, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return neurons(ranks, folder, "experts")


@torch.no_grad()
def test_neurons_and_curve_are_those_of_a_plain_reading(ranks: RankPool, folder: Path) -> None:
    """Of transformers' model: products and columns multiplied out, and left out by sorting."""
    found, means = neurons(ranks, folder, "source")
    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder / "source")(topics["assignment"], add_special_tokens=False)
    windows = torch.tensor(ids.input_ids[: TOKENS + TOKENS // LENGTH]).view(-1, LENGTH + 1)
    seen: dict[int, list[torch.Tensor]] = {}
    left_out = 0

    def watched(number: int, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        inside = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        outputs = inside.unsqueeze(-1) * mlp.down_proj.weight.T  # [1, T, F, hidden]
        norms = outputs.norm(dim=-1)
        weakest = norms.argsort(dim=-1)[..., :left_out]
        seen.setdefault(number, []).append(torch.stack((inside[0].abs(), norms[0])))
        return outputs.scatter(2, weakest.unsqueeze(-1).expand(-1, -1, -1, outputs.shape[-1]), 0.0).sum(2)

    for number, layer in enumerate(model.model.layers):
        layer.mlp.forward = lambda x, number=number, mlp=layer.mlp: watched(number, mlp, x)
    for percent, row in zip(MASKED, found["masked"], strict=True):
        left_out = round(percent * WIDTH / 100)
        losses = [torch.nn.functional.cross_entropy(model(w[None, :-1]).logits[0], w[1:]) for w in windows]
        assert row["percent"] == percent
        assert row["cross_entropy"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
        if not percent:
            for number, parts in seen.items():
                activations, norms = torch.cat(parts, 1).mean(1)
                name = f"layers.{number}.mlp"
                assert torch.allclose(means[f"{name}.activation"], activations, rtol=1e-4)
                assert torch.allclose(means[f"{name}.output_norm"], norms, rtol=1e-4)
    entropies = [row["cross_entropy"] for row in found["masked"]]
    assert entropies[0] == found["cross_entropy"] and len(set(entropies)) == len(entropies)


def assert_same(
    found: tuple[dict[str, Any], dict[str, torch.Tensor]],
    expected: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    assert found[0]["cross_entropy"] == pytest.approx(expected[0]["cross_entropy"], abs=1e-5)
    for one, other in zip(found[0]["masked"], expected[0]["masked"], strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], abs=1e-4)
    for one, other in zip(found[0]["layers"], expected[0]["layers"], strict=True):
        for sort in ("activation", "output_norm"):
            assert one[sort]["mean"] == pytest.approx(other[sort]["mean"], rel=1e-4)
            assert one[sort]["held_by_largest"] == pytest.approx(other[sort]["held_by_largest"], abs=2e-3)


def test_experts_are_watched_one_by_one(of_experts: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    means = of_experts[1]
    names = {name.removesuffix(".activation") for name in means if name.endswith(".activation")}
    routed = {f"layers.1.mlp.experts.local_experts.{number}" for number in range(4)}
    assert {"layers.0.mlp", "layers.1.mlp.shared_experts", *routed} <= names
    assert all(each.shape == (WIDTH,) for name, each in means.items())


def test_an_export_says_what_its_checkpoint_says(
    ranks: RankPool, folder: Path, of_experts: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    assert_same(neurons(ranks, folder, "export"), of_experts)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("tp2_sp",), id="TP 2"),
        pytest.param(("expert_model_parallel_size=2",), id="EP 2"),
        pytest.param(("pipeline_model_parallel_size=2",), id="PP 2", marks=pytest.mark.slow),
        pytest.param(("context_parallel_size=2",), id="CP 2", marks=pytest.mark.slow),
    ],
)
def test_every_topology_says_the_same(
    settings: tuple[str, ...],
    ranks: RankPool,
    folder: Path,
    of_experts: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    found = neurons(ranks, folder, "experts", "--parallel", *settings, world_size=2)
    assert_same(found, of_experts)
    assert found[1].keys() == of_experts[1].keys()
    for name, mean in found[1].items():
        assert torch.allclose(mean, of_experts[1][name], rtol=1e-3, atol=1e-6), name


def test_histograms_say_what_sorting_says() -> None:
    """To the width of a bin, 12 %."""
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0)).exp()
    histogram = Histogram(torch.device("cpu"))
    histogram.add(values[:7000])
    histogram.add(values[7000:])
    ordered = values.double().sort(descending=True).values
    for share in (0.5, 0.9, 0.99):
        assert histogram.quantile(share) == pytest.approx(float(values.quantile(share)), rel=0.13)
    for share in (0.01, 0.1, 0.3):
        held = float(ordered[: round(share * len(values))].sum() / ordered.sum())
        assert histogram.held_by_largest(share) == pytest.approx(held, abs=0.01)
    assert histogram.mean == pytest.approx(float(values.double().mean()))
