"""spikingbrain-bricks abilities: scores as scikit-learn has them, matrices as transformers, ranks as one."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikingbrain_train.bricks.abilities import Abilities, average_precision, scores_of, top_neurons
from tests.bricks.models import bricks, save_models
from tests.distributed.pool import RankFailure, RankPool

LENGTH, WINDOWS, PRUNE = 32, 4, 12.5
NAMES = {"lists": "lists", "classes": "class", "strings": "formatstrings"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`tests.bricks.models.save_models`; and a text of each ability."""
    folder = tmp_path_factory.mktemp("abilities")
    save_models(folder)
    for name, topic in NAMES.items():
        (folder / f"{name}.txt").write_text(topics[topic] * 3)
    return folder


def abilities(
    ranks: RankPool, folder: Path, model: str, *more: str, world_size: int = 1
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    output = folder / f"out_{model}_{world_size}"
    words = ["abilities", "--model", str(folder / model), "--output", str(output), "--trust-remote-code"]
    words += ["--texts", *(f"{name}={folder / name}.txt" for name in NAMES)]
    words += ["--seq-length", str(LENGTH), "--windows", str(WINDOWS), "--prune", str(PRUNE), *more]
    ranks.run(bricks, *words, world_size=world_size)
    assert (output / "abilities.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((output / "abilities.json").read_text()), load_file(output / "abilities.safetensors")


def test_average_precision_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(3)
    values, labels = torch.rand(23, 50, generator=generator), torch.rand(23, generator=generator) < 0.3
    expected = [average_precision_score(labels.numpy(), column.numpy()) for column in values.T]
    assert average_precision(values, labels).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_neuron_that_only_one_ability_uses_is_the_first_of_that() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = {name: {(0, "mlp"): torch.rand(6, 40, generator=generator)} for name in ("a", "b", "c")}
    rows["b"][(0, "mlp")][:, 7] += 5
    rows["c"][(0, "mlp")][:, 9] += 3
    chosen = {name: top_neurons(each, 1 / 40)[(0, "mlp")] for name, each in scores_of(rows).items()}
    assert chosen["b"].nonzero().flatten().tolist() == [7]
    assert chosen["c"].nonzero().flatten().tolist() == [9]


def test_rows_whose_own_ability_is_hit_worst_are_counted() -> None:
    found = Abilities(
        ["a", "b"], 0.1, [1.0, 2.0], [[1.5, 2.1], [1.3, 2.2]], [1.0, 2.0], [[1, 0], [0, 1]], 10, 1
    )
    assert found.damage[1] == pytest.approx([0.3, 0.2]) and found.own_hit_worst == 1


@pytest.fixture(scope="module")
def of_source(ranks: RankPool, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return abilities(ranks, folder, "source")


@torch.no_grad()
def test_the_matrix_is_that_of_a_model_with_those_columns_zeroed(
    folder: Path, of_source: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    """In transformers: the pruned neurons' columns of the down projections are set to 0. Rounding alone."""
    found, neurons = of_source
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    for row, name in enumerate(NAMES):
        model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)
        for number, layer in enumerate(model.model.layers):
            mask = neurons[f"{name}.layers.{number}.mlp"].bool()
            assert int(mask.sum()) == 6  # 12.5 % of 48
            layer.mlp.down_proj.weight[:, mask] = 0
        for column, text in enumerate(NAMES):
            ids = tokenizer((folder / f"{text}.txt").read_text(), add_special_tokens=False).input_ids
            windows = torch.tensor(ids[: WINDOWS * (LENGTH + 1)]).view(WINDOWS, -1)[WINDOWS // 2 :]
            losses = [
                torch.nn.functional.cross_entropy(model(w[None, :-1]).logits[0], w[1:]) for w in windows
            ]
            expected = float(torch.stack(losses).mean())
            assert found["cross_entropy_without"][row][column] == pytest.approx(expected, abs=1e-5)


def test_overlap_and_residents_are_counted_over_the_whole_model(
    of_source: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    found, neurons = of_source
    masks = {
        name: torch.cat([each.bool() for key, each in sorted(neurons.items()) if key.startswith(f"{name}.")])
        for name in NAMES
    }
    for row, one in zip(found["overlap"], masks.values(), strict=True):
        expected = [float((one & other).sum() / (one | other).sum()) for other in masks.values()]
        assert row == pytest.approx(expected)
    assert found["neurons"] == len(masks["lists"]) and 0 <= found["resident"] <= int(masks["lists"].sum())


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("tp2_sp",), id="TP 2"),
        pytest.param(("pipeline_model_parallel_size=2",), id="PP 2", marks=pytest.mark.slow),
    ],
)
def test_every_topology_finds_the_same_neurons(
    settings: tuple[str, ...], ranks: RankPool, folder: Path
) -> None:
    alone, whose = abilities(ranks, folder, "experts")
    spread, theirs = abilities(ranks, folder, "experts", "--parallel", *settings, world_size=2)
    assert theirs.keys() == whose.keys() and spread["neurons"] == alone["neurons"]
    # Scores that are equal but for rounding may change places.
    differing = sum(int((theirs[name] != mask).sum()) for name, mask in whose.items())
    assert differing <= 4 * len(NAMES)
    assert spread["cross_entropy"] == pytest.approx(alone["cross_entropy"], abs=1e-5)
    for one, other in zip(spread["cross_entropy_without"], alone["cross_entropy_without"], strict=True):
        assert one == pytest.approx(other, abs=5e-3)


def test_ranks_that_would_read_several_windows_at_once_are_refused(ranks: RankPool, folder: Path) -> None:
    with pytest.raises(RankFailure, match="SystemExit: 2"):
        abilities(ranks, folder, "experts", "--parallel", "context_parallel_size=2", world_size=2)
