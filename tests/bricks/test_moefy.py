"""spikingbrain-bricks moefy: exact at k = n, what it measures is what it writes, and exports compute that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from spikingbrain_train.bricks.partition import clustered_bricks, coactive_bricks, random_bricks
from spikingbrain_train.bricks.routers import brick_norms, fitted_router
from spikingbrain_train.bricks.trained_router import trained_router
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE, latest_checkpoint
from tests.bricks.models import bricks
from tests.distributed import small_runs
from tests.distributed.pool import RankPool
from tests.small_source import save_small_source

LENGTH, WINDOWS, EXPERTS = 32, 4, 12


def evaluated(ranks: RankPool, folder: Path, model: str, *more: str) -> float:
    """Cross entropy of a model on the windows that moefy measures on: as ``neurons`` reads it."""
    output = folder / f"read_{model}"
    words = ["neurons", "--model", str(folder / model), "--text", str(folder / "second.txt"), "--mask"]
    words += ["--output", str(output), "--seq-length", str(LENGTH), "--windows", str(WINDOWS // 2)]
    ranks.run(bricks, *words, "--trust-remote-code", *more, world_size=1)
    return float(json.loads((output / "neurons.json").read_text())["cross_entropy"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``dense`` hybrid and a ``text.txt``, whose ``second.txt`` half is measured on."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("moefy")
    source = save_small_source(folder / "source")
    import_checkpoint(source, folder / "dense", ConversionConfig(mixers=["gla", "swa"], sliding_window=7))
    text = topics["assignment"]
    (folder / "text.txt").write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text, add_special_tokens=False).input_ids[WINDOWS // 2 * (LENGTH + 1) :]
    second = tokenizer.decode(ids)
    assert tokenizer(second, add_special_tokens=False).input_ids[:LENGTH] == ids[:LENGTH]
    (folder / "second.txt").write_text(second)
    return folder


def cut(ranks: RankPool, folder: Path, name: str, *more: str, topk: int = 4) -> dict[str, Any]:
    words = ["moefy", "--model", str(folder / "dense"), "--text", str(folder / "text.txt")]
    words += ["--seq-length", str(LENGTH), "--windows", str(WINDOWS), "--output", str(folder / name)]
    ranks.run(bricks, *words, "--experts", str(EXPERTS), "--topk", str(topk), *more, world_size=1)
    found = json.loads((folder / name / "moefy.json").read_text())
    assert isinstance(found, dict)
    return found


def entropies(found: dict[str, Any]) -> dict[tuple[str, str, int], float]:
    return {(row["partition"], row["router"], row["k"]): row["cross_entropy"] for row in found["rows"]}


def test_with_all_experts_it_is_the_dense_model(ranks: RankPool, folder: Path) -> None:
    """Sums in another order: 1e-5 of rounding."""
    found = entropies(cut(ranks, folder, "whole", topk=EXPERTS))
    dense = found["dense", "none", EXPERTS]
    assert all(value == pytest.approx(dense, abs=1e-5) for value in found.values())
    assert evaluated(ranks, folder, "whole") == pytest.approx(evaluated(ranks, folder, "dense"), abs=1e-5)


@pytest.fixture(scope="module")
def of_some(ranks: RankPool, folder: Path) -> dict[tuple[str, str, int], float]:
    return entropies(cut(ranks, folder, "some", "--measure", "2", "4"))


def test_nothing_is_measured_where_no_number_of_experts_is_asked_for(ranks: RankPool, folder: Path) -> None:
    assert cut(ranks, folder, "unmeasured", "--router", "centres", "--measure")["rows"] == []
    assert evaluated(ranks, folder, "unmeasured") > 0


def test_what_is_written_computes_what_was_measured(
    ranks: RankPool, folder: Path, of_some: dict[tuple[str, str, int], float]
) -> None:
    """Neurons masked in the dense model, and experts of an ordinary checkpoint: the same function."""
    assert len({round(value, 7) for value in of_some.values()}) == len(of_some)
    expected = of_some["clusters", "fitted", 4]
    assert evaluated(ranks, folder, "some") == pytest.approx(expected, abs=1e-5)


def test_an_export_computes_the_same(
    ranks: RankPool, folder: Path, of_some: dict[tuple[str, str, int], float]
) -> None:
    export_checkpoint(folder / "some", folder / "export")
    expected = of_some["clusters", "fitted", 4]
    assert evaluated(ranks, folder, "export") == pytest.approx(expected, abs=1e-5)
    import_checkpoint(folder / "export", folder / "again", None)
    models = [
        load_model_config(latest_checkpoint(folder / name, "--model") / MODEL_CONFIG_FILE).moe
        for name in ("some", "again")
    ]
    assert models[0].router_weights == models[1].router_weights and models[0].router_topk == 4


def test_a_router_with_a_hidden_layer_is_written_and_exported(ranks: RankPool, folder: Path) -> None:
    """And what a curve needs of every number of experts is measured and drawn."""
    more = ("--router", "mlp", "--router-hidden-size", "24", "--measure", "2", "4", "8")
    found = entropies(cut(ranks, folder, "mlp", *more))
    assert {k for _, _, k in found} == {2, 4, 8, EXPERTS}
    names = {router for partition, router, _ in found if partition == "clusters"}
    assert names == {"oracle", "mlp", "fitted", "centres", "random"}
    assert (folder / "mlp" / "moefy.png").read_bytes().startswith(b"\x89PNG")
    expected = found["clusters", "mlp", 4]
    assert evaluated(ranks, folder, "mlp") == pytest.approx(expected, abs=1e-5)
    export_checkpoint(folder / "mlp", folder / "export_mlp")
    assert evaluated(ranks, folder, "export_mlp") == pytest.approx(expected, abs=1e-5)


def test_other_cuts_and_routers_are_written_too(ranks: RankPool, folder: Path) -> None:
    found = entropies(cut(ranks, folder, "coactive", "--partition", "coactivation", "--router", "centres"))
    expected = found["coactivation", "centres", 4]
    assert evaluated(ranks, folder, "coactive") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--experts", "7", "--topk", "2"), "--experts 7 does not divide the feed-forward's 48 neurons"),
        (("--experts", "12", "--topk", "13"), "--topk 13 must be 1 to 12, the number of --experts"),
        (("--experts", "12", "--topk", "2", "--measure", "13"), "--measure has 13; give 1 to 12"),
        (
            ("--experts", "12", "--topk", "2", "--router-hidden-size", "4"),
            "--router-hidden-size 4 is of --router mlp, but --router is fitted",
        ),
        (("--experts", "12", "--topk", "2", "--windows", "3"), "--windows is 3; give an even number"),
    ],
)
def test_what_cannot_be_cut_so_is_refused_in_one_sentence(
    folder: Path, words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bricks(
            *("moefy", "--model", str(folder / "dense"), "--text", "text.txt", "--output", str(folder / "x")),
            *("--seq-length", "32", *words),
        )
    assert sentence in capsys.readouterr().err.replace("\n", " ")


def test_a_model_that_has_experts_is_refused(folder: Path) -> None:
    from spikingbrain_train.bricks.moefy_command_line import moefied

    dense = load_model_config(latest_checkpoint(folder / "dense", "--model") / MODEL_CONFIG_FILE)
    with pytest.raises(ConfigurationError, match="feed-forwards of the kinds dense, moe; moefy cuts dense"):
        moefied(replace(dense, feed_forwards=["dense", "moe"]), 12, 2)


def test_partitions_are_balanced_and_find_what_is_there() -> None:
    """Rows that are noisy copies of a few directions, and neurons that work in groups."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.arange(48) % 6
    directions = torch.eye(6, 20)
    rows = directions[groups] + 0.05 * torch.randn(48, 20, generator=generator)
    tokens = (torch.rand(200, 6, generator=generator) < 0.3).float()
    norms = tokens[:, groups] + 0.05 * torch.rand(200, 48, generator=generator)
    random = random_bricks(48, 6, 0)
    for found in (clustered_bricks(rows, 6, 0), coactive_bricks(norms, 6, 0), random):
        assert torch.bincount(found, minlength=6).tolist() == [8] * 6
    together = [groups[coactive_bricks(norms, 6, 0) == number] for number in range(6)]
    purity = sum(int(torch.bincount(each).max()) for each in together) / 48
    apart = sum(int(torch.bincount(groups[random == number]).max()) for number in range(6)) / 48
    assert purity > 0.75 > apart


def test_a_fitted_router_finds_experts_that_depend_on_the_input() -> None:
    """Four bricks, each of which works where one input channel is large."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(600, 8, generator=generator)
    parts = torch.arange(16) // 4
    norms = x[:, parts].exp()
    best = brick_norms(norms[400:], parts, 4).argmax(-1)
    for router in (
        fitted_router(x[:400], norms[:400], parts, 4),
        trained_router(x[:400], norms[:400], parts, 4, hidden_size=16, seed=0),
    ):
        hits = float((router.scores(x[400:]).argmax(-1) == best).double().mean())
        assert hits > 0.8  # 0.25 by chance


def test_a_trained_router_finds_what_no_linear_can() -> None:
    """Four bricks, each of which gives most where one input channel is neither small nor large."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5000, 4, generator=generator)
    gives = (4 * x * (-x.square()).exp()).exp()
    parts = torch.arange(16) // 4
    norms, best = gives[:, parts], gives[4000:].argmax(-1)
    trained = trained_router(x[:4000], norms[:4000], parts, 4, hidden_size=32, seed=0)
    hits = [
        float((router.scores(x[4000:]).argmax(-1) == best).double().mean())
        for router in (trained, fitted_router(x[:4000], norms[:4000], parts, 4))
    ]
    assert hits[0] > hits[1] + 0.08
    again = trained_router(x[:4000], norms[:4000], parts, 4, hidden_size=32, seed=0)
    assert torch.equal(again.weight, trained.weight)


def test_a_run_starts_from_it_and_its_routers_learn(
    ranks: RankPool, folder: Path, of_some: dict[tuple[str, str, int], float]
) -> None:
    """Continual pretraining of two steps on two expert-parallel ranks, as on one."""
    text = small_runs.write_text(folder)
    start = latest_checkpoint(folder / "some", "--model")
    model = load_model_config(start / MODEL_CONFIG_FILE)
    losses = {}
    for size in (1, 2):
        output = folder / f"trained_{size}"
        config = small_runs.run_config(
            output, text, model=model, checkpoint=small_runs.checkpoint_config(folder / "some")
        )
        config.stage = replace(config.stage, train_iters=2)
        config.optimizer.lr_warmup_iters = 0
        config.parallel = ParallelConfig(expert_model_parallel_size=size)
        (losses[size], *_) = ranks.run(small_runs.train, config, world_size=size, parallel=config.parallel)
    assert len(losses[1]) == 2
    assert [pair[0] for pair in losses[2]] == pytest.approx([pair[0] for pair in losses[1]], rel=1e-5)
    before, after = (
        MegatronCheckpointReader(latest_checkpoint(path, "--model")).read(
            "decoder.layers.0.mlp.router.weight"
        )
        for path in (folder / "some", folder / "trained_1" / "checkpoints")
    )
    assert not torch.equal(before, after)
