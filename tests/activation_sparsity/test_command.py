"""spikingbrain-analyze-sparsity on one model in all of its forms and over ranks.

In float32: a gate that is almost 0 has either sign, as rounding decides, so forms and topologies agree in all
but a few of 12,288 products.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.model import ActivationFunc, MoEConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from tests.distributed.pool import RankPool
from tests.small_source import save_small_source

TOKENS, LENGTH, WIDTH = 64, 32, 48
OF_ZEROS = 1e-3


def analyze(*arguments: str) -> None:
    """The command, on every rank of a pool."""
    from spikingbrain_train.activation_sparsity.command_line import analyze_sparsity

    analyze_sparsity([*arguments, "--device", "cpu", "--dtype", "float32"])


def convert(*arguments: str) -> None:
    """A command line that the analysis prints."""
    from spikingbrain_train.conversion.command_line import convert_checkpoint, export

    program, *words = arguments
    (export if program == "spikingbrain-export" else convert_checkpoint)(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with ReLU, a hybrid with experts, the export of each, their source and a text."""
    folder = tmp_path_factory.mktemp("sparsity")
    source = save_small_source(folder / "source")
    relu = ActivationFunc.relu
    import_checkpoint(source, folder / "dense", ConversionConfig(mixers=["full"], activation_func=relu))
    experts = ConversionConfig(
        mixers=["gla", "swa"],
        sliding_window=7,
        activation_func=relu,
        feed_forwards=["dense", "moe"],
        moe=MoEConfig(num_experts=4, router_topk=2, num_shared_experts=1),
    )
    import_checkpoint(source, folder / "experts", experts)
    for name in ("dense", "experts"):
        export_checkpoint(folder / name, folder / f"{name}_export")
    (folder / "text.txt").write_text(topics["assignment"])
    return folder


def analyzed(ranks: RankPool, folder: Path, model: str, *more: str, world_size: int = 1) -> dict[str, Any]:
    output = folder / f"out_{model}_{len(more)}_{world_size}"
    words = ["--model", str(folder / model), "--text", str(folder / "text.txt"), "--output", str(output)]
    words += ["--seq-length", str(LENGTH), "--windows", str(TOKENS // LENGTH), "--trust-remote-code", *more]
    ranks.run(analyze, *words, world_size=world_size)
    assert (output / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((output / "sparsity.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def of_dense(ranks: RankPool, folder: Path) -> dict[str, Any]:
    return analyzed(ranks, folder, "dense")


@pytest.fixture(scope="module")
def of_experts(ranks: RankPool, folder: Path) -> dict[str, Any]:
    return analyzed(ranks, folder, "experts")


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["cross_entropy"] == pytest.approx(expected["cross_entropy"], abs=1e-5)
    for one, other in zip([found, *found["layers"]], [expected, *expected["layers"]], strict=True):
        assert one["channels"] == other["channels"]
        assert one["computed_per_token"] == other["computed_per_token"]
        assert one["sparsity"] == pytest.approx(other["sparsity"], abs=OF_ZEROS)
        for name in ("never_active", "always_active"):
            assert abs(one[name] - other[name]) <= 1
    for one, other in zip(found["thresholds"], expected["thresholds"], strict=True):
        assert one["threshold"] == other["threshold"]
        assert one["sparsity"] == pytest.approx(other["sparsity"], abs=OF_ZEROS)
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], abs=1e-4)


@torch.no_grad()
def test_zeros_are_those_that_transformers_multiplies_by(folder: Path, of_dense: dict[str, Any]) -> None:
    """Of transformers' own Qwen2 with ReLU, whose down projections are watched."""
    model = AutoModelForCausalLM.from_pretrained(folder / "dense_export", dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.")
    inside: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs, number=number: inside.setdefault(number, []).append(inputs[0][0])
        )
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense_export")
    ids = tokenizer(topics["assignment"], add_special_tokens=False).input_ids[: TOKENS + TOKENS // LENGTH]
    losses = []
    for window in torch.tensor(ids).view(-1, LENGTH + 1):
        losses.append(torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:]))
    assert of_dense["cross_entropy"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    for layer in of_dense["layers"]:
        whole = torch.cat(inside[layer["layer"]])
        assert whole.shape == (TOKENS, WIDTH) and layer["channels"] == WIDTH
        assert layer["sparsity"] == pytest.approx(float((whole == 0).double().mean()), abs=OF_ZEROS)
        assert layer["active_per_token"] == pytest.approx(float((whole != 0).sum(1).double().mean()), abs=0.1)
        assert abs(layer["never_active"] - int((whole == 0).all(0).sum())) <= 1
        assert abs(layer["always_active"] - int((whole != 0).all(0).sum())) <= 1
    assert 0.3 < of_dense["sparsity"] < 0.7


def test_of_experts_those_count_that_tokens_are_sent_to(of_experts: dict[str, Any]) -> None:
    """Two of four experts and the shared one, each as wide as the source's feed-forward is split."""
    dense, experts = of_experts["layers"][0], of_experts["layers"][1]
    assert dense["computed_per_token"] == dense["channels"] == WIDTH
    width = experts["channels"] / 5
    assert experts["computed_per_token"] == pytest.approx(3 * width)


def test_higher_thresholds_close_more_gates(of_dense: dict[str, Any]) -> None:
    curve = of_dense["thresholds"]
    assert [each["threshold"] for each in curve] == [0, 0.005, 0.01, 0.02, 0.05, 0.1]
    assert curve[0]["sparsity"] == of_dense["sparsity"] and of_dense["fit"] is None
    assert all(a["sparsity"] < b["sparsity"] for a, b in zip(curve, curve[1:], strict=False))


def test_exports_say_what_their_checkpoints_say(
    ranks: RankPool, folder: Path, of_dense: dict[str, Any], of_experts: dict[str, Any]
) -> None:
    assert_same(analyzed(ranks, folder, "dense_export"), of_dense)
    assert_same(analyzed(ranks, folder, "experts_export"), of_experts)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("tp2_sp",), id="TP 2 + sequence parallel"),
        pytest.param(("expert_model_parallel_size=2",), id="EP 2"),
        pytest.param(("pipeline_model_parallel_size=2",), id="PP 2", marks=pytest.mark.slow),
        pytest.param(("context_parallel_size=2",), id="CP 2", marks=pytest.mark.slow),
    ],
)
def test_every_topology_counts_the_same(
    settings: tuple[str, ...], ranks: RankPool, folder: Path, of_experts: dict[str, Any]
) -> None:
    assert_same(analyzed(ranks, folder, "experts", "--parallel", *settings, world_size=2), of_experts)


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_what_a_fit_tells_to_type_gives_a_folder_with_that_threshold(
    name: str, ranks: RankPool, folder: Path
) -> None:
    budget = ("--thresholds", "--fit-threshold", "--loss-budget", "0.02")
    found = analyzed(ranks, folder, name, *budget)
    fitted = found["fit"]["threshold"]
    entropies = {each["threshold"]: each["cross_entropy"] for each in found["thresholds"]}
    assert entropies[fitted] <= found["cross_entropy"] + 0.02 and fitted > 0
    if found["fit"]["refused"] is not None:  # a random model may not get worse
        assert entropies[found["fit"]["refused"]] > found["cross_entropy"] + 0.02
    for command in found["fit"]["commands"]:
        ranks.run(convert, *shlex.split(command), world_size=1)
    written = analyzed(ranks, folder, f"{name}-fatrelu", "--thresholds")
    assert written["threshold"] == fitted
    assert written["cross_entropy"] == pytest.approx(entropies[fitted], abs=1e-4)


def test_a_model_of_swiglus_is_told_that_it_has_no_zeros(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_checkpoint(folder / "source", folder / "silu", ConversionConfig(mixers=["full"]))
    for model, activation in (("source", "SiLUActivation"), ("silu", "silu")):
        with pytest.raises(SystemExit):
            analyze("--model", str(folder / model), "--text", str(folder / "text.txt"), "--seq-length", "32")
        sentence = f"has no zeros to count: its gates go through {activation}, not relu"
        assert sentence in capsys.readouterr().err.replace("\n", " ")
