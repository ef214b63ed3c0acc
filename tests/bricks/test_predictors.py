"""spikingbrain-bricks predictors: what it trains, on one model in several forms and over ranks.

In float32: a gate that is almost 0 has either sign, as rounding decides, so what is learnt in forms and
topologies agrees but for a few pairs of a token and a neuron (1 % of shares, 1e-3 nats).
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

from spikingbrain_train.bricks.activity_predictor import (
    Activity,
    cutoffs_for,
    fitted_predictor,
    packed,
    unpacked,
)
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.model import ActivationFunc, MoEConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.bricks.models import bricks
from tests.distributed.pool import RankFailure, RankPool
from tests.small_source import save_small_source

LENGTH, WINDOWS, HELD_OUT, WIDTH = 32, 68, 4, 48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``dense`` model with FATReLU, its ``export``, a hybrid with ``experts``, and a text."""
    folder = tmp_path_factory.mktemp("predictors")
    source = save_small_source(folder / "source")
    fatrelu: Any = {"activation_func": ActivationFunc.fatrelu, "fatrelu_threshold": 0.05}
    import_checkpoint(source, folder / "dense", ConversionConfig(mixers=["full"], **fatrelu))
    moe = MoEConfig(num_experts=4, router_topk=2, num_shared_experts=1)
    experts = ConversionConfig(
        mixers=["gla", "swa"], sliding_window=7, feed_forwards=["dense", "moe"], moe=moe, **fatrelu
    )
    import_checkpoint(source, folder / "experts", experts)
    export_checkpoint(folder / "dense", folder / "export")
    (folder / "text.txt").write_text(topics["assignment"])
    return folder


def predictors(
    ranks: RankPool, folder: Path, model: str, *more: str, world_size: int = 1
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    output = folder / f"out_{model}_{len(more)}_{world_size}"
    words = ["predictors", "--model", str(folder / model), "--text", str(folder / "text.txt")]
    words += ["--output", str(output), "--seq-length", str(LENGTH), "--windows", str(WINDOWS)]
    words += ["--held-out", str(HELD_OUT), "--hidden", "16", "--trust-remote-code", *more]
    ranks.run(bricks, *words, world_size=world_size)
    assert (output / "predictors.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((output / "predictors.json").read_text()), load_file(output / "predictors.safetensors")


@pytest.fixture(scope="module")
def of_dense(ranks: RankPool, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return predictors(ranks, folder, "dense")


@torch.no_grad()
def test_numbers_are_those_of_a_plain_reading_with_what_was_written(
    folder: Path, of_dense: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    """transformers' Llama-form export, its feed-forwards written out with the stored weights and cut-offs."""
    found, weights = of_dense
    model = AutoModelForCausalLM.from_pretrained(
        folder / "export", dtype=torch.float32, trust_remote_code=True
    )
    ids = AutoTokenizer.from_pretrained(folder / "source")(topics["assignment"], add_special_tokens=False)
    windows = torch.tensor(ids.input_ids[: WINDOWS * (LENGTH + 1)]).view(WINDOWS, -1)[-HELD_OUT:]
    counts: dict[int, torch.Tensor] = {}
    cutoff: float | int = 0

    def predicted(number: int, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        inside = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        name = f"layers.{number}.mlp"
        hidden = torch.relu(x @ weights[f"{name}.fc1.weight"].T)
        least = weights[f"{name}.cutoffs"][cutoff] if isinstance(cutoff, int) else cutoff
        kept = hidden @ weights[f"{name}.fc2.weight"].T >= least
        active = inside != 0
        row = torch.tensor([active.numel(), active.sum(), kept.sum(), (active & kept).sum()])
        counts[number] = counts.get(number, 0) + row
        return mlp.down_proj(inside * kept)

    for number, layer in enumerate(model.model.layers):
        layer.mlp.forward = lambda x, number=number, mlp=layer.mlp: predicted(number, mlp, x)
    assert [each["recall_asked_for"] for each in found["readings"]] == [None, 0.9, 0.95, 0.99]
    for asked, reading in zip((0.0, 0, 1, 2), found["readings"], strict=True):
        cutoff = asked
        counts.clear()
        losses = [torch.nn.functional.cross_entropy(model(w[None, :-1]).logits[0], w[1:]) for w in windows]
        assert reading["cross_entropy"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-3)
        for layer in reading["layers"]:
            pairs, active, kept, both = counts[layer["layer"]].double().tolist()
            assert pairs == HELD_OUT * LENGTH * WIDTH
            assert layer["sparsity"] == pytest.approx(1 - active / pairs, abs=0.01)
            assert layer["predicted_sparsity"] == pytest.approx(1 - kept / pairs, abs=0.01)
            assert layer["recall"] == pytest.approx(both / active, abs=0.01)
            assert layer["precision"] == pytest.approx(both / kept, abs=0.01)


def test_a_higher_recall_leaves_out_less(
    of_dense: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    """And what is learnt holds on other text: neurons of a random model depend on its input smoothly."""
    found = of_dense[0]
    asked = found["readings"][1:]
    for one, other in zip(asked, asked[1:], strict=False):
        assert one["recall"] < other["recall"] and one["predicted_sparsity"] > other["predicted_sparsity"]
    for each in asked:
        assert each["recall"] == pytest.approx(each["recall_asked_for"], abs=0.06)
    # Of neurons drawn by lot as many would be active as of all.
    assert asked[0]["precision"] > 1 - asked[0]["sparsity"] + 0.05
    assert found["tokens"] == {"trained": 56 * LENGTH, "kept_back": 8 * LENGTH, "held_out": HELD_OUT * LENGTH}
    assert found["predictor_parameters"] == 4 * 16 * (32 + WIDTH)
    assert found["feed_forward_parameters"] == 4 * 3 * 32 * WIDTH


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["cross_entropy"] == pytest.approx(expected["cross_entropy"], abs=1e-5)
    for one, other in zip(found["readings"], expected["readings"], strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], abs=1e-3)
        for a, b in zip([one, *one["layers"]], [other, *other["layers"]], strict=True):
            for name in ("sparsity", "predicted_sparsity", "recall", "precision"):
                assert a[name] == pytest.approx(b[name], abs=0.01), name


def test_an_export_says_what_its_checkpoint_says(
    ranks: RankPool, folder: Path, of_dense: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    found, weights = predictors(ranks, folder, "export")
    assert_same(found, of_dense[0])
    assert weights.keys() == of_dense[1].keys()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("tp2_sp",), id="TP 2"),
        pytest.param(("pipeline_model_parallel_size=2",), id="PP 2", marks=pytest.mark.slow),
    ],
)
def test_every_topology_says_the_same(
    settings: tuple[str, ...], ranks: RankPool, folder: Path, of_experts: dict[str, Any]
) -> None:
    found, _ = predictors(ranks, folder, "experts", "--parallel", *settings, world_size=2)
    assert_same(found, of_experts)
    for one, other in zip(found["feed_forwards"], of_experts["feed_forwards"], strict=True):
        assert one["name"] == other["name"] and one["tokens"] == other["tokens"]
        assert one["kept_back_loss"] == pytest.approx(other["kept_back_loss"], rel=1e-2)


@pytest.fixture(scope="module")
def of_experts(ranks: RankPool, folder: Path) -> dict[str, Any]:
    return predictors(ranks, folder, "experts")[0]


def test_experts_have_predictors_of_their_own(of_experts: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in of_experts["feed_forwards"]}
    assert {"layers.0.mlp", "layers.1.mlp.shared_experts"} <= rows.keys()
    routed = [row for name, row in rows.items() if name.startswith("layers.1.mlp.experts.")]
    assert sum(row["tokens"] for row in routed) == 2 * of_experts["tokens"]["trained"]


def activity(tokens: int, seed: int) -> Activity:
    """Neurons that are active where one of 12 inputs is large; the last input is constant, as of real models,
    whose predictors have no biases either."""
    x = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed))
    active = x[:, torch.arange(50) % 12] > 0.8
    return Activity(torch.cat((x, torch.ones(tokens, 1)), 1) * 30, packed(active), 50)


def test_a_rule_that_can_be_learnt_is_learnt() -> None:
    others = activity(1000, 2)
    fitted = fitted_predictor(
        activity(4000, 0), activity(500, 1), hidden=32, recalls=(0.95,), epochs=100, seed=0, device=CPU
    )
    active = unpacked(others.active, 50)
    expected = fitted.predictor(others.inputs) >= fitted.cutoffs[0]
    recall = float((active & expected).sum() / active.sum())
    assert recall == pytest.approx(0.95, abs=0.02)
    assert float((active & expected).sum() / expected.sum()) > 0.75  # 0.21 of the neurons are active


def test_cutoffs_are_the_highest_that_find_enough() -> None:
    """Held against counting, for every neuron's logit."""
    kept = activity(60, 3)
    fitted = fitted_predictor(kept, kept, hidden=4, recalls=(0.5,), epochs=1, seed=0, device=CPU)
    logits, active = fitted.predictor(kept.inputs), unpacked(kept.active, 50)
    for recall in (0.01, 0.5, 0.9, 1.0):
        (cutoff,) = cutoffs_for(fitted.predictor, kept, (recall,), CPU)
        shares = [(float(c), float((logits[active] >= c).double().mean())) for c in logits[active]]
        assert cutoff == max(c for c, share in shares if share >= recall - 1e-12)
    silent = Activity(kept.inputs, torch.zeros_like(kept.active), 50)
    assert cutoffs_for(fitted.predictor, silent, (0.9,), CPU) == (-torch.inf,)


@pytest.mark.parametrize("channels", [1, 8, 50])
def test_bits_come_back(channels: int) -> None:
    active = torch.rand(7, channels, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(unpacked(packed(active), channels), active)


def test_a_model_of_swiglus_has_nothing_to_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_checkpoint(folder / "source", folder / "silu", ConversionConfig(mixers=["full"]))
    for model, activation in (("source", "SiLUActivation"), ("silu", "silu")):
        with pytest.raises(SystemExit):
            bricks("predictors", "--model", str(folder / model), "--text", str(folder / "text.txt"))
        assert f"its gates go through {activation}" in capsys.readouterr().err.replace("\n", " ")


def test_ranks_that_would_share_windows_are_refused(ranks: RankPool, folder: Path) -> None:
    """Each rank prints the sentence and ends with the code of a user's mistake."""
    with pytest.raises(RankFailure, match="SystemExit: 2"):
        predictors(ranks, folder, "dense", "--hidden", "8", "--seed", "1", world_size=2)
