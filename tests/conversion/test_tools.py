"""The command lines, as a user types them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spikingbrain_train.conversion.command_line import convert_checkpoint, export
from tests.conversion.hf_models import HFCheckpoint, all_tensors

REPOSITORY = Path(__file__).parents[2]


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        convert_checkpoint([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_import_inspect_export(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = hf_checkpoint("qwen2")
    hybrid = tmp_path / "hybrid"
    convert_checkpoint(
        ["import", "--hf", str(source), "--output", str(hybrid), "--conversion", "spikingbrain_7b"]
        + ["sliding_window=64", "gla.init_gate_bias_max=1.5"]
    )
    out = capsys.readouterr().out
    assert "2 gla + 2 swa (window 64)" in out
    assert "from -16 to 1.5" in out
    convert_checkpoint(["inspect", str(hybrid)])
    assert "exports as GLAswaForCausalLM" in capsys.readouterr().out
    export(
        ["--checkpoint", str(hybrid), "--output", str(tmp_path / "hf"), "--dtype", "bfloat16"]
        + ["--max-shard-size", "10KB"]
    )
    assert {str(tensor.dtype) for tensor in all_tensors(tmp_path / "hf").values()} == {"torch.bfloat16"}
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    convert_checkpoint(["inspect", str(tmp_path / "hf")])
    assert "Hugging Face checkpoint, GLAswaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("conversion", "scaled"), [("spikingbrain_76b", "0.98"), ("spikingbrain_76b_exact", "0.9412")]
)
def test_dry_run_of_the_76b_recipe(
    hf_checkpoint: HFCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    conversion: str,
    scaled: str,
) -> None:
    """Its pattern is for 28 layers; 0.9412 = 16/17."""
    source, _ = hf_checkpoint("qwen2", vocab_size=200, num_hidden_layers=28)
    output = tmp_path / "out"
    convert_checkpoint(
        ["import", "--hf", str(source), "--output", str(output), "--conversion", conversion, "--dry-run"]
    )
    out = capsys.readouterr().out
    assert "24 [gla,swa] (window 4096) + 4 [gla,full]; " in out
    assert "7 dense + 21 moe (16 experts, top-1, + 1 shared of width 48)" in out
    assert re.search(rf"routed experts +\d+ .* copied and scaled by {re.escape(scaled)}\n", out)
    assert re.search(r"sink tokens +1 +4,096 +new: ", out)
    assert not output.exists()


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (30, "26 [gla,swa] (window 4096) + 4 [gla,full]; 7 dense + 23 moe"),
        (24, "21 [gla,swa] (window 4096) + 3 [gla,full]; 7 dense + 17 moe"),
        (8, "7 [gla,swa] (window 4096) + 1 [gla,full]; 5 dense + 3 moe"),
    ],
)
def test_the_76b_recipe_fits_a_source_of_another_depth(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], depth: int, layers: str
) -> None:
    """It begins as the published 28 layers do, and goes on as they end."""
    source, _ = hf_checkpoint("qwen2", vocab_size=200, num_hidden_layers=depth)
    recipe = ["--conversion", "spikingbrain_76b", "--dry-run"]
    convert_checkpoint(["import", "--hf", str(source), "--output", str(tmp_path / "out"), *recipe])
    assert layers in capsys.readouterr().out


def test_a_source_of_fewer_layers_than_a_recipe_lists_has_the_first_and_a_note(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = hf_checkpoint("qwen2", vocab_size=200, num_hidden_layers=4)
    command = ["import", "--hf", source, "--output", tmp_path / "out", "--conversion", "spikingbrain_76b"]
    convert_checkpoint([*map(str, command), "--dry-run"])
    told = capsys.readouterr().out
    assert "4 [gla,swa] (window 4096); 3 dense + 1 moe" in told
    assert (
        "note: mixers of the recipe lists 7 layers, of which the source has the first 4; mixers=[...]" in told
    )
    changed = [*map(str, command), "mixers=[[gla,swa],[gla,full]]", "--dry-run"]
    convert_checkpoint(changed)
    assert "2 [gla,swa] (window 4096) + 2 [gla,full]; 3 dense + 1 moe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sliding_window=3"], "sliding_window=3 changes a recipe, but none is given; add --conversion"),
        (["--conversion", "spikingbrain_8b"], "there is no conversion spikingbrain_8b"),
        (["--conversion", "spikingbrain_7b", "mixers=[gla,rwkv]"], "rwkv"),
        (["--conversion", "spikingbrain_7b", "slidingwindow=3"], "slidingwindow"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(
    hf_checkpoint: HFCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    source, _ = hf_checkpoint()
    error = failure(capsys, "import", "--hf", source, "--output", tmp_path / "out", *arguments)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["5 apples", "0GB", "-1GB", ""])
def test_a_wrong_shard_size_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    error = failure(
        capsys, "export", "--checkpoint", tmp_path, "--output", tmp_path / "o", f"--max-shard-size={size}"
    )
    assert error.startswith(f"error: --max-shard-size {size}".rstrip())


def test_the_scripts_run_and_fail_with_exit_code_2(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for script, arguments in (
        ("convert_checkpoint.py", ["import", "--hf", "nowhere", "--output", str(tmp_path / "out")]),
        ("export.py", ["--checkpoint", "nowhere", "--output", str(tmp_path / "out")]),
    ):
        command = [sys.executable, str(REPOSITORY / "tools" / script)]
        failed = subprocess.run(command + arguments, env=environment, capture_output=True, text=True)
        assert failed.returncode == 2
        assert "nowhere" in failed.stderr
        assert failed.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["import", "--help"], ["export", "--help"]])
def test_help_teaches(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        convert_checkpoint(arguments)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "Megatron" in out
    assert arguments == ["--help"] or "examples:" in out


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (
            ["--help"],
            ["spikingbrain_76b_exact", "sliding_window=4096", "router_init_std=0.02", "num_experts"],
        ),
        (["--help=upcycling"], ["upcycling.form = published", "Only the down projection", "at least 0"]),
        (["--help=conversion"], ["--conversion <choice>", "an exact Megatron copy"]),
        (["--help=conversion=dense"], ["mixers: [full]"]),
    ],
)
def test_help_of_import_teaches_recipes_and_their_settings(
    capsys: pytest.CaptureFixture[str], ask: list[str], expected: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        convert_checkpoint(["import", *ask])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(words in out for words in expected)
    assert "on resume" not in out


def test_help_about_an_unknown_setting_of_recipes_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        convert_checkpoint(["import", "--help=upcycling.for"])
    assert exit_.value.code == 2
    assert "did you mean --help=upcycling.form?" in capsys.readouterr().err


def test_export_takes_the_folder_of_a_run(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its help shows: outputs/cpt, whose checkpoints lie in outputs/cpt/checkpoints."""
    source, _ = hf_checkpoint("qwen2")
    run = tmp_path / "outputs/cpt"
    convert_checkpoint(["import", "--hf", str(source), "--output", str(run / "checkpoints")])
    for number, folder in enumerate((run, run / "checkpoints", run / "checkpoints/iter_0000000")):
        export(["--checkpoint", str(folder), "--output", str(tmp_path / f"hf{number}")])
        assert f"{run / 'checkpoints/iter_0000000'} -> " in capsys.readouterr().out
    convert_checkpoint(["inspect", str(run)])
    assert "exports as Qwen2ForCausalLM" in capsys.readouterr().out
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("7")
    assert "names iteration 7 as its newest" in failure(
        capsys, "export", "--checkpoint", run, "--output", tmp_path / "none"
    )
