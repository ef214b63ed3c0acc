"""spikingbrain-choose-layers on a model in which one layer matters and another does not.

In float32; 1e-5 nats between the chosen model and its own conversion, and between topologies.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_conversion
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.data.gpt_dataset import HeldOutSamples
from spikingbrain_train.data.preprocess import PreprocessOptions, preprocess
from spikingbrain_train.errors import DataError
from spikingbrain_train.layer_choice.measurements import MEASUREMENTS_FILE
from spikingbrain_train.layer_choice.text import Stretch, stretches_of, windows_of
from tests.distributed.pool import RankPool
from tests.programs import Programs
from tests.small_source import MODEL_VOCAB_SIZE, save_small_source

FACTORS = (0.03, 1.0, 1e-6, 0.03)
"""Of the attention's output projection in each layer."""
MATTERS, DOES_NOT = 1, 2
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def text(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(topics["assignment"])
    preprocess(PreprocessOptions([str(folder / "text.txt")], str(folder / "text"), str(source)))
    return folder / "text"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What attention adds is little in all layers but one, and in one as good as nothing."""
    folder = save_small_source(tmp_path_factory.mktemp("source"))
    weights = load_file(folder / "model.safetensors")
    for layer, factor in enumerate(FACTORS):
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"] *= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def checkpoints(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source, and a form of it in which every layer is swapped, as an align stage would leave one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    import_checkpoint(source, folder / "dense")
    import_checkpoint(source, folder / "all", ConversionConfig(mixers=["gla"], sliding_window=7))
    return folder / "dense", folder / "all"


def choose_layers(*arguments: str) -> None:
    """The command, on every rank of a pool."""
    from spikingbrain_train.layer_choice.command_line import choose_layers

    choose_layers([*arguments, "--device", "cpu", "--dtype", "float32"])


def cross_entropy(*arguments: str) -> None:
    from spikingbrain_train.evaluation.command_line import evaluate

    evaluate([*arguments, "--device", "cpu", "--dtype", "float32"])


def chosen(ranks: RankPool, folder: Path, *arguments: Any, world_size: int = 1) -> dict[str, Any]:
    """What the command writes."""
    words = [*map(str, arguments), "--output", str(folder), "--seq-length", "32", "--tokens", "96"]
    ranks.run(choose_layers, *words, world_size=world_size)
    found = json.loads((folder / "layers.json").read_text())
    assert isinstance(found, dict)
    return found


def costs(found: dict[str, Any]) -> list[float]:
    return [found["layers"][str(layer)]["kl_divergence"] for layer in range(4)]


def test_the_layer_that_does_not_matter_is_swapped_and_the_one_that_does_stays(
    ranks: RankPool, tmp_path: Path, source: Path, text: Path
) -> None:
    """From the Hugging Face folder alone: the new mixers are set in closed form."""
    words = ("--model", source, "--data", text, "--calibration-data", text, "--calibration-tokens", 256)
    found = chosen(ranks, tmp_path / "one", *words, "--swap", 1, "--kept", "full")
    measured = costs(found)
    assert measured.index(min(measured)) == DOES_NOT and measured[DOES_NOT] < 1e-6
    assert measured.index(max(measured)) == MATTERS and measured[MATTERS] > 1e-3
    assert found["mixers"] == ["full", "full", "gla", "full"]
    assert found["kept_only"]["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert found["chosen"]["kl_divergence"] == measured[DOES_NOT] < found["evenly_spaced"]["kl_divergence"]
    assert (tmp_path / "one/layers.png").stat().st_size > 1000
    assert not (tmp_path / "one/work").exists()


def test_what_is_measured_on_is_not_what_mixers_are_set_on(source: Path, text: Path) -> None:
    """Of a dataset that both flags name: 320 tokens to measure on, then 100 to set mixers on."""
    measured, calibration = stretches_of([str(text)], 320, [str(text)], 100, 32)
    assert (measured, calibration) == ([Stretch(str(text), 0, 10)], [Stretch(str(text), 10, 4)])
    read = [window for stretch in (*measured, *calibration) for window in tokens_of(stretch)]
    straight = tokens_of(Stretch(str(text), 0, 14))
    assert torch.equal(torch.stack(read), torch.stack(straight)) and len(read) == 14

    # Where both ask for more than there is, each has a half; another spelling is the same dataset.
    windows = len(tokens_of(Stretch(str(text), 0, 10**6)))
    spelled = f"{text.parent}/../{text.parent.name}/{text.name}"
    (measured_half,), (calibration_half,) = stretches_of([str(text)], 10**6, [spelled], 10**6, 32)
    assert len(tokens_of(measured_half)) == windows // 2
    assert len(tokens_of(calibration_half)) == windows - windows // 2
    apart = stretches_of([str(text)], 320, ["other"], 100, 32)
    assert apart == ([Stretch(str(text), 0, 10)], [Stretch("other", 0, 4)])
    with pytest.raises(DataError, match="has too few tokens for two windows of 100000"):
        stretches_of([str(text)], 320, [str(text)], 100, 100_000)


def tokens_of(stretch: Stretch) -> list[torch.Tensor]:
    """Of every window of 32."""
    samples = windows_of(stretch, 32, MODEL_VOCAB_SIZE)
    assert sum(samples.predicted_tokens()) == sum(int(each["loss_mask"].sum()) for each in all_of(samples))
    return [sample["tokens"] for sample in all_of(samples)]


def all_of(samples: HeldOutSamples) -> list[Any]:
    return [samples[index] for index in range(len(samples))]


def test_the_recipe_makes_the_model_that_was_measured(
    ranks: RankPool, tmp_path: Path, source: Path, text: Path, checkpoints: tuple[Path, Path]
) -> None:
    dense, swapped = checkpoints
    words = ("--model", dense, "--aligned", swapped, "--data", text, "--keep", DOES_NOT, "--kept", "swa")
    found = chosen(ranks, tmp_path / "out", *words, "--swap", 2)
    assert found["mixers"] == ["gla", "swa", "swa", "gla"] and len(found["layers"]) == 3
    recipe = load_conversion(str(tmp_path / "out/conversion.yaml"))
    assert recipe.mixers == found["mixers"] and recipe.sliding_window == 7
    import_checkpoint(source, tmp_path / "hybrid", recipe)
    for model, expected in ((tmp_path / "hybrid", found["chosen"]), (dense, found["source"])):
        result = tmp_path / "result.json"
        shared = ("--data", str(text), "--seq-length", "32", "--max-windows", "3", "--output", str(result))
        ranks.run(cross_entropy, "--model", str(model), *shared, world_size=1)
        assert json.loads(result.read_text())["cross_entropy"] == pytest.approx(
            expected["cross_entropy"], abs=1e-5
        )


def test_a_source_with_windows_of_its_own_is_measured_with_them(
    ranks: RankPool, tmp_path: Path, source: Path, text: Path
) -> None:
    """Layers that stay have the recipe's windows, which cost nothing where they are the source's."""
    windowed = Path(shutil.copytree(source, tmp_path / "windowed"))
    config = json.loads((windowed / "config.json").read_text())
    own = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
    layer_types = ["sliding_attention"] * 4
    (windowed / "config.json").write_text(json.dumps(config | own | {"layer_types": layer_types}))
    words = ("--data", text, "--calibration-data", text, "--calibration-tokens", 64, "--swap", 1)
    found = chosen(ranks, tmp_path / "out", "--model", windowed, *words, "--kept", "swa", "sliding_window=5")
    assert found["kept_only"]["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert found["mixers"].count("swa") == 3
    result = tmp_path / "result.json"
    shared = ("--data", str(text), "--seq-length", "32", "--max-windows", "3", "--output", str(result))
    ranks.run(cross_entropy, "--model", str(windowed), *shared, world_size=1)
    of_its_own = json.loads(result.read_text())["cross_entropy"]
    assert found["source"]["cross_entropy"] == pytest.approx(of_its_own, abs=1e-5)
    ranks.run(cross_entropy, "--model", str(source), *shared, world_size=1)
    assert abs(json.loads(result.read_text())["cross_entropy"] - of_its_own) > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["tp2_sp"], id="TP 2 + sequence parallel"),
        pytest.param([], id="DP 2", marks=pytest.mark.slow),
        pytest.param(["context_parallel_size=2"], id="CP 2", marks=pytest.mark.slow),
    ],
)
def test_every_topology_measures_the_same(
    settings: list[str], ranks: RankPool, tmp_path: Path, text: Path, checkpoints: tuple[Path, Path]
) -> None:
    words = ("--model", checkpoints[0], "--aligned", checkpoints[1], "--data", text, "--kept", "swa")
    one = chosen(ranks, tmp_path / "one", *words, "--greedy")
    parallel = ["--parallel", *settings] if settings else []
    two = chosen(ranks, tmp_path / "two", *words, "--greedy", *parallel, world_size=2)
    assert costs(two) == pytest.approx(costs(one), abs=1e-5)
    assert two["mixers"] == one["mixers"] and two["chosen"]["order"] == one["chosen"]["order"]


def test_a_stopped_choice_goes_on(
    ranks: RankPool, tmp_path: Path, text: Path, checkpoints: tuple[Path, Path]
) -> None:
    """Here of a Megatron checkpoint alone, which is converted through its own Hugging Face form."""
    calibration = ("--calibration-data", text, "--calibration-tokens", 64)
    words = ("--model", checkpoints[0], "--data", text, *calibration)
    first = chosen(ranks, tmp_path, *words)
    record = tmp_path / MEASUREMENTS_FILE
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:4]))  # settings, source, two models
    assert chosen(ranks, tmp_path, *words) == first
    assert record.read_text().splitlines(keepends=True)[:4] == lines[:4]
    assert len(record.read_text().splitlines()) == len(lines)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name training data with --calibration-data, or an aligned checkpoint with --aligned"),
        (["--swap", "none"], "--swap none is no number of layers"),
        (["--keep", "99"], "--keep 99 names the layer 99; the model has 0 to 3"),
        (["--keep", "0,1,2", "--swap", "2"], "--swap 2 is 2 layers, but 1 of 4 may be swapped"),
        (["--parallel", "pp2"], "splits the layers, any of which may be swapped"),
        (["--conversion", "nowhere"], "there is no conversion nowhere"),
        (["sliding_windo=3"], "sliding_windo"),
        (["--aligned", "{dense}"], "--aligned {dense} does not swap every candidate for the same mixer"),
        (["--aligned", "{all}", "--to", "gla"], "is what --aligned {all} was converted with; leave it out"),
        (["--model", "{all}"], "--model {all} is a hybrid already"),
    ],
)
def test_what_cannot_be_chosen_is_one_sentence(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    source: Path,
    text: Path,
    checkpoints: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"dense": checkpoints[0], "all": checkpoints[1]}
    calibration = ["--calibration-data", str(text)] if words else []
    given = ["--model", str(source), "--data", str(text), "--output", str(tmp_path / "out"), *calibration]
    with pytest.raises(SystemExit, match="2"):
        choose_layers(*given, *(word.format(**names) for word in words))
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence.format(**names) in said and said.count("\n") == 1


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(
    programs: Programs, tmp_path: Path, source: Path, text: Path
) -> None:
    words = [str(ROOT / "tools/choose_layers.py"), "--model", str(source), "--data", str(text), "--dry-run"]
    words += ["--calibration-data", str(text), "--output", str(tmp_path / "out")]
    done = programs.run(words, tmp_path)
    assert done.code == 0, done.said
    assert "swapped        2 of 4 candidates, set in closed form" in done.output
    assert "measured       7 models on 16,384 tokens, 0 of them known" in done.output
    assert not (tmp_path / "out").exists()
