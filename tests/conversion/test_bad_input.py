"""Damaged sources and unusable outputs end in one sentence, and leave nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.conversion import ConversionConfig, UpcyclingConfig
from spikingbrain_train.conversion import output_folder
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.conversion.safetensors_io import SafetensorsReader
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from tests.conversion.hf_models import HFCheckpoint, all_tensors

SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}


def resave(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def refuses(source: Path, tmp_path: Path, sentence: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=sentence):
        import_checkpoint(source, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_tensor(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    tensors = all_tensors(source)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    resave(source, tensors)
    refuses(source, tmp_path, r"model\.layers\.1\.mlp\.up_proj\.weight of LlamaForCausalLM is missing")


def test_unknown_tensor(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    resave(source, all_tensors(source) | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(8)})
    refuses(
        source,
        tmp_path,
        r"model\.layers\.0\.self_attn\.o_proj\.bias is not part of LlamaForCausalLM",
    )


def test_wrong_shape(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    resave(source, all_tensors(source) | {"model.norm.weight": torch.ones(9)})
    refuses(source, tmp_path, r"model\.norm\.weight has shape \[9\], but config\.json asks for \[8\]")


def test_vocabulary_that_config_does_not_describe(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    resave(source, all_tensors(source) | {"model.embed_tokens.weight": torch.ones(24, 8)})
    refuses(
        source, tmp_path, r"embed_tokens\.weight has shape \[24, 8\], but config\.json asks for \[20, 8\]"
    )


def test_integer_weights(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    resave(source, all_tensors(source) | {"model.norm.weight": torch.ones(8, dtype=torch.int8)})
    refuses(source, tmp_path, r"model\.norm\.weight has dtype I8")


def test_parts_of_one_parameter_in_two_dtypes(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    tensors = all_tensors(source)
    name = "model.layers.0.self_attn.k_proj.weight"
    resave(source, tensors | {name: tensors[name].half()})
    refuses(source, tmp_path, r"differ in dtype.*k_proj\.weight is float16")


def test_number_formats_that_differ_are_kept_and_told(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    name = "model.layers.0.mlp.down_proj.weight"
    resave(source, all_tensors(source) | {name: all_tensors(source)[name].bfloat16()})
    report = import_checkpoint(source, tmp_path / "out")
    (note,) = (note for note in report.notes if "number formats" in note)
    assert note.endswith(" in float32, 1 in bfloat16")
    stored = MegatronCheckpointReader(tmp_path / "out/iter_0000000").tensors
    assert stored["decoder.layers.0.mlp.linear_fc2.weight"].properties.dtype is torch.bfloat16


def test_tied_output_layer_that_differs(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL, tie_word_embeddings=True)
    resave(source, all_tensors(source) | {"lm_head.weight": torch.ones(20, 8)})
    refuses(source, tmp_path, r"lm_head\.weight differs from the embedding")


def test_a_damaged_tied_output_layer_is_still_a_copy(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL, tie_word_embeddings=True)
    tensors = all_tensors(source)
    tensors["model.embed_tokens.weight"][3, 2] = float("nan")
    resave(source, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    report = import_checkpoint(source, tmp_path / "out", allow_damaged_weights=True)
    assert "lm_head.weight (identical to the tied embedding)" in report.ignored


def test_missing_shard(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL, max_shard_size="1KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    refuses(source, tmp_path, f"{shard.name} is missing; copy the whole folder")


def test_tensor_that_the_index_places_elsewhere(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL, max_shard_size="1KB")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, shard in index["weight_map"].items() if shard == shards[0])
    index["weight_map"][name] = shards[1]
    path.write_text(json.dumps(index))
    refuses(source, tmp_path, f"does not hold {name}")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}']
)
def test_malformed_index(hf_checkpoint: HFCheckpoint, tmp_path: Path, content: str) -> None:
    source, _ = hf_checkpoint(**SMALL, max_shard_size="1KB")
    (source / "model.safetensors.index.json").write_text(content)
    refuses(source, tmp_path, r"model\.safetensors\.index\.json")


def test_pickled_weights_only(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refuses(source, tmp_path, "has neither model.safetensors nor")


def test_a_pickle_under_the_name_of_safetensors(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    for older in (False, True):
        torch.save(
            all_tensors(source) if not older else {},
            source / "other",
            _use_new_zipfile_serialization=not older,
        )
        os.replace(source / "other", source / "model.safetensors")
        refuses(source, tmp_path, r"model\.safetensors is a pickle under the name of a safetensors file")


def test_a_pointer_in_place_of_the_file(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3554214752\n"
    (source / "model.safetensors").write_text(pointer)
    refuses(
        source, tmp_path, r"model\.safetensors is a pointer of Git LFS in place of the file; run git lfs pull"
    )


def test_no_source_folder(tmp_path: Path) -> None:
    refuses(tmp_path / "absent", tmp_path, "absent is not a folder")


@pytest.fixture(scope="module")
def safetensors_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("damaged")
    save_file({"a": torch.randn(5, 3), "b": torch.ones(4).bfloat16()}, folder / "model.safetensors")
    return folder, (folder / "model.safetensors").read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_truncated_anywhere_is_refused(safetensors_bytes: tuple[Path, bytes], share: float) -> None:
    folder, content = safetensors_bytes
    (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        SafetensorsReader(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(max_size=60), length=st.integers(0, 2**64 - 1))
def test_a_file_of_noise_is_refused(
    safetensors_bytes: tuple[Path, bytes], header: bytes, length: int
) -> None:
    folder, _ = safetensors_bytes
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        SafetensorsReader(folder)


# What lies at the output


def test_occupied_output_needs_overwrite_and_a_folder_of_ours(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    out = tmp_path / "out"
    import_checkpoint(source, out)
    with pytest.raises(CheckpointError, match="out is not empty; choose another folder or add --overwrite"):
        import_checkpoint(source, out)
    import_checkpoint(source, out, overwrite=True)
    (out / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="not made by this command and --overwrite leaves it alone"):
        import_checkpoint(source, out, overwrite=True)
    assert (out / "iter_0000000/model_config.yaml").exists()


def test_output_must_not_overlap_the_source(hf_checkpoint: HFCheckpoint) -> None:
    source, _ = hf_checkpoint(**SMALL)
    for output in (source, source / "inside", source.parent):
        with pytest.raises(CheckpointError, match="overlap"):
            import_checkpoint(source, output, overwrite=True)


def test_output_that_is_a_file(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    (tmp_path / "out").write_text("precious")
    with pytest.raises(CheckpointError, match="out is a file"):
        import_checkpoint(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_output(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="locked is not writable"):
        import_checkpoint(source, locked / "out")


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="no mount point that is known to be there")
def test_an_output_that_is_a_mount_point_is_noticed_before_writing(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    sentence = "/proc is a mount point, whose place no folder can take; choose a folder in it"
    with pytest.raises(CheckpointError, match=sentence):
        import_checkpoint(source, Path("/proc"), overwrite=True)


def test_too_little_space_is_noticed_before_writing(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    usage = output_folder.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
    refuses(source, tmp_path, r"0\.0 MB free; make room")


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full stands for the full disk: every write to it fails with ENOSPC."""
    source, _ = hf_checkpoint(**SMALL)
    out = tmp_path / "out"
    import_checkpoint(source, out)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    open_path = Path.open

    def open_full(self: Path, *args: str, **kwargs: str):
        return open_path(Path("/dev/full") if self.suffix == ".distcp" else self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(CheckpointError, match=r"No space left on device\); nothing was changed"):
        import_checkpoint(source, out, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_a_killed_conversion_left_is_removed_by_the_next_one(
    hf_checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left = tmp_path / f"out.tmp-{killed.pid}"
    (left / "new/iter_0000000").mkdir(parents=True)
    import_checkpoint(source, tmp_path / "out", dry_run=True)
    assert left.exists()
    import_checkpoint(source, tmp_path / "out")
    left.mkdir()
    import_checkpoint(source, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_interrupt_leaves_nothing(
    hf_checkpoint: HFCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = hf_checkpoint(**SMALL)
    before = sorted(tmp_path.rglob("*"))
    reads = iter(range(5))

    def interrupted(self: SafetensorsReader, name: str, rows: tuple[int, int] | None) -> torch.Tensor:
        if next(reads) == 4:
            raise KeyboardInterrupt
        return read(self, name, rows)

    read = SafetensorsReader.read
    monkeypatch.setattr(SafetensorsReader, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(source, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


# Recipes


def test_a_hybrid_source_is_not_converted_again(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    import_checkpoint(source, tmp_path / "megatron", ConversionConfig())
    export_checkpoint(tmp_path / "megatron", tmp_path / "hybrid")
    with pytest.raises(CheckpointError, match="is a hybrid already"):
        import_checkpoint(tmp_path / "hybrid", tmp_path / "again", ConversionConfig())


def test_a_recipe_that_does_not_fit(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    source, _ = hf_checkpoint(**SMALL)
    with pytest.raises(ConfigurationError, match="sliding_window=0 must be at least 1"):
        import_checkpoint(source, tmp_path / "out", ConversionConfig(sliding_window=0))
    with pytest.raises(ConfigurationError, match="mixers"):
        import_checkpoint(source, tmp_path / "out", ConversionConfig(mixers=[]))
    with pytest.raises(ConfigurationError, match=r"upcycling\.reinit_fraction=2 must be between 0"):
        recipe = ConversionConfig(upcycling=UpcyclingConfig(reinit_fraction=2))
        import_checkpoint(source, tmp_path / "out", recipe)


# Megatron checkpoints


@pytest.fixture
def megatron_folder(hf_checkpoint: HFCheckpoint, tmp_path: Path) -> Path:
    source, _ = hf_checkpoint(**SMALL)
    import_checkpoint(source, tmp_path / "megatron")
    return tmp_path / "megatron/iter_0000000"


@pytest.fixture
def unlisted_folder(megatron_folder: Path) -> Path:
    """The same without checksums, as from Megatron-LM or from somebody who knows better."""
    (megatron_folder / "manifest.json").unlink()
    return megatron_folder


class _Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_metadata_that_would_run_code_is_refused_and_does_not(
    unlisted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (unlisted_folder / ".metadata").write_bytes(pickle.dumps(_Attack()))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged or not checkpoint metadata .*mkdir"):
        MegatronCheckpointReader(unlisted_folder)
    assert not (tmp_path / "attacked").exists()


def test_weights_that_would_run_code_are_refused_and_do_not(
    unlisted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = unlisted_folder / "__0_0.distcp"
    torch.save(_Attack(), tmp_path / "attack")
    attack = (tmp_path / "attack").read_bytes()
    data.write_bytes(attack + b"\0" * max(0, data.stat().st_size - len(attack)))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: .* cannot be read"):
        MegatronCheckpointReader(unlisted_folder).read("embedding.word_embeddings.weight")
    assert not (tmp_path / "attacked").exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_truncated_data_file_is_refused(megatron_folder: Path, tmp_path: Path, share: float) -> None:
    data = megatron_folder / "__0_0.distcp"
    content = data.read_bytes()
    try:
        data.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
            export_checkpoint(megatron_folder, tmp_path / "out")
    finally:
        data.write_bytes(content)
    assert not (tmp_path / "out").exists()


def test_bytes_that_differ_from_what_was_imported_are_refused(megatron_folder: Path, tmp_path: Path) -> None:
    data = megatron_folder / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[-200] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged or of another save"):
        export_checkpoint(megatron_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_bytes_within_a_data_file_are_refused(unlisted_folder: Path, tmp_path: Path) -> None:
    data = unlisted_folder / "__0_0.distcp"
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: .* cannot be read"):
        export_checkpoint(unlisted_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_that_points_outside_of_the_folder_is_refused(unlisted_folder: Path) -> None:
    path = unlisted_folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"points outside of the folder, at \.\./\.\./secret"):
        MegatronCheckpointReader(unlisted_folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_metadata_is_refused(megatron_folder: Path, share: float) -> None:
    path = megatron_folder / ".metadata"
    content = path.read_bytes()
    try:
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
            MegatronCheckpointReader(megatron_folder)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "model_config.yaml"])
def test_a_missing_file_is_named(megatron_folder: Path, tmp_path: Path, name: str) -> None:
    (megatron_folder / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        export_checkpoint(megatron_folder.parent, tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            ("num_layers: 2", "num_layers: 3"),
            r"decoder\.layers\.2\.input_layernorm\.weight is missing",
        ),
        (("num_layers: 2", "num_layers: 1"), r"decoder\.layers\.1\..* is not part of the model"),
        (("hidden_size: 8", "hidden_size: 16"), r"has shape \[20, 8\], but model_config\.yaml asks for"),
        (("vocab_size: 20", "vocab_size: 21"), r"has shape \[20, 8\], but model_config\.yaml asks for"),
    ],
)
def test_a_checkpoint_of_another_architecture(
    megatron_folder: Path, tmp_path: Path, setting: tuple[str, str], sentence: str
) -> None:
    path = megatron_folder / "model_config.yaml"
    path.write_text(path.read_text().replace(*setting))
    with pytest.raises(CheckpointError, match=sentence):
        export_checkpoint(megatron_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no latest_checkpointed_iteration.txt"):
        export_checkpoint(tmp_path, tmp_path / "out")
