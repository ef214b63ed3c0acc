"""The average of checkpoints, held to sums in float64; what has no average is refused in a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.conversion.average import average_checkpoints, decaying_shares, equal_shares
from spikingbrain_train.conversion.command_line import convert_checkpoint
from spikingbrain_train.conversion.difference import diff_checkpoints
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.inspect_checkpoint import inspect_checkpoint
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.planning.token_history import history_with
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint
from tests.conversion.hf_models import HFCheckpoint, all_tensors
from tests.conversion.test_tools import failure

OLD = Path(__file__).parents[1] / "old_checkpoints" / "76b"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = MegatronCheckpointReader(latest_checkpoint(folder, "folder"))
    return {name: reader.read(name) for name in reader.tensors}


def three(hf_checkpoint: HFCheckpoint, **changes: object) -> list[Path]:
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        folders.append(hf_checkpoint("qwen2", folder=f"source{seed}", **changes)[0])
    return folders


def test_hugging_face_folders(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    sources = three(hf_checkpoint, max_shard_size="40KB")
    shares = decaying_shares(3, 0.75)
    assert shares == [0.5625, 0.1875, 0.25]
    average_checkpoints(sources, tmp_path / "out", shares)
    stored = [all_tensors(source) for source in sources]
    for name, found in all_tensors(tmp_path / "out").items():
        exact = sum(share * each[name].double() for share, each in zip(shares, stored, strict=True))
        # Three roundings of float32.
        assert (found.double() - exact).abs().max() <= 4 * 2**-24 * exact.abs().max(), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    first = inspect_checkpoint(tmp_path / "out").lineage[0]
    assert first.did == f"average of 3 checkpoints, from {', '.join(map(str, sources))}"


def test_equal_checkpoints_stay_what_they_are(tmp_path: Path) -> None:
    """Bit for bit, experts, sinks and branches; optimizer state is left out, tokens are told."""
    report = average_checkpoints([OLD] * 3, tmp_path / "out", equal_shares(3))
    assert not diff_checkpoints(OLD, tmp_path / "out").differ
    here = latest_checkpoint(tmp_path / "out", "out")
    assert here.name == "iter_0000000" and inspect_checkpoint(here).training is None
    assert history_with(here).tokens == 256 and report.table().count("0.3333") == 3


def test_bf16_hybrids_of_megatron(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    recipe = ConversionConfig(mixers=["gla", "swa"], sliding_window=7)
    folders = []
    for source in three(hf_checkpoint, dtype=torch.bfloat16):
        folders.append(tmp_path / f"hybrid_{source.name}")
        import_checkpoint(source, folders[-1], recipe)
    convert_checkpoint(
        ["average", "--checkpoints", *map(str, folders), "--weights", "1", "0", "3"]
        + ["--output", str(tmp_path / "out")]
    )
    stored = [weights(folder) for folder in folders]
    for name, found in weights(tmp_path / "out").items():
        exact = 0.25 * stored[0][name].double() + 0.75 * stored[2][name].double()
        assert found.dtype is torch.bfloat16
        assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max(), name
    assert (latest_checkpoint(tmp_path / "out", "out") / "hf_source" / "tokenizer.json").is_file()


def run_of(number: int, folder: Path) -> Path:
    """A run's folder with checkpoints of as many iterations, the last of which is incomplete."""
    for iteration in range(1, number + 1):
        shutil.copytree(OLD / "checkpoints/iter_0000002", folder / f"checkpoints/iter_{iteration:07d}")
    (folder / f"checkpoints/iter_{number:07d}/__0_0.distcp").unlink()
    (folder / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(number - 1))
    return folder


def test_the_newest_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(4, tmp_path / "run")
    line = ["average", "--checkpoints", str(run), "--output", str(tmp_path / "out"), "--dry-run"]
    convert_checkpoint([*line, "--last", "2", "--ema", "0.5"])
    said = capsys.readouterr().out
    assert "iter_0000001" not in said and "iter_0000002" in said and "iter_0000003" in said
    assert "would write" in said and not (tmp_path / "out").exists()
    assert "--last 4 must be 2 to 3" in failure(capsys, *line, "--last", "4")
    assert "is one checkpoint; name two or more, or add --last N" in failure(capsys, *line)
    assert "--weights lists 1 numbers for 2" in failure(capsys, *line, "--last", "2", "--weights", "1")
    assert "--ema 1.0 must be between 0 and 1" in failure(capsys, *line, "--last", "2", "--ema", "1")


def test_what_has_no_average(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    one, _ = hf_checkpoint("qwen2", folder="one")
    wide, _ = hf_checkpoint("qwen2", folder="wide", intermediate_size=64)
    narrow, _ = hf_checkpoint("qwen2", folder="narrow", dtype=torch.bfloat16)
    import_checkpoint(one, tmp_path / "megatron")
    spoiled, model = hf_checkpoint("qwen2", folder="spoiled")
    with torch.no_grad():
        model.model.norm.weight[1] = float("nan")
    model.save_pretrained(spoiled)
    for other, sentence in (
        (wide, "wide has ffn_hidden_size=64 where .*one has"),
        (narrow, "narrow: .* is bfloat16, but float32 in .*; save both in one number format"),
        (tmp_path / "megatron", "is a Hugging Face folder and .* a Megatron one"),
        (spoiled, r"spoiled: model.norm.weight holds NaN \(first at \[1\]\); leave this checkpoint out"),
        (tmp_path / "nowhere", "nowhere is not a folder"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            average_checkpoints([one, other], tmp_path / "out", equal_shares(2))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
