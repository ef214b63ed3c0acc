"""Exports of kinds from outside carry their code and compute what the Megatron model computes.

Bounds as in tests/conversion/test_own_format.py: logits 2e-4, generation token for token.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.architecture.same_architecture import roles, settings_in_use
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.linear_transforms import Projection, SpikingConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import ModelConfig, MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.setting import Role
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.errors import CheckpointError, SpikingBrainError
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE
from tests.conversion.test_own_format import check, save_and_compute
from tests.distributed.pool import RankPool
from tests.evaluation.exported_folders import Text, check_both_commands, save_text
from tests.hf.test_exported_folder import run_where_the_project_is_not
from tests.plugins.test_kinds_from_outside import model

pytestmark = pytest.mark.usefixtures("plugins")


def with_rounding(network: ModelConfig, projections: list[Projection], step: float = 0.5) -> ModelConfig:
    network.rounding = replace(network.rounding, projections=projections, step=step)  # type: ignore[attr-defined]
    return network


MODELS: dict[str, Callable[[], ModelConfig]] = {
    "fixed_decay and relu_squared, q/k norms": lambda: model(qk_layernorm=True, add_output_bias=True),
    "all three with sinks and biases": lambda: with_rounding(
        model(num_sink_tokens=6, add_qkv_bias=True), [each for each in Projection if each.name != "gate"]
    ),
    "spikes in front of every projection": lambda: model(
        spiking=SpikingConfig([each for each in Projection if each.name != "gate"])
    ),
    "rounding of gates and experts": lambda: with_rounding(
        model(
            mixers=["gla", ["gla", "full"]],
            feed_forwards=["moe", "relu_squared"],
            moe=MoEConfig(num_experts=4, router_topk=2),
            norm_epsilon=1e-1,
        ),
        list(Projection),
        step=0.2,
    ),
}


def stored(ranks: RankPool, network: ModelConfig, folder: Path) -> Any:
    """Save a Megatron checkpoint of known weights; what its model computes."""
    arguments = (network, network, folder)
    (expected,) = ranks.run(save_and_compute, *arguments, world_size=1, parallel=ParallelConfig())
    return expected


@pytest.mark.parametrize("name", MODELS)
def test_an_export_agrees_with_the_megatron_model_and_comes_back_bit_identical(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    network, export = MODELS[name](), tmp_path / f"export_{list(MODELS).index(name)}"
    expected = stored(ranks, network, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", export)
    check(AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval(), expected)

    import_checkpoint(export, tmp_path / "again")
    first, second = (
        MegatronCheckpointReader(tmp_path / folder)
        for folder in ("megatron/iter_0000003", "again/iter_0000000")
    )
    assert first.tensors.keys() == second.tensors.keys()
    for tensor in second.tensors:
        ours = second.read(tensor)
        assert torch.equal(ours, first.read(tensor)[: len(ours)]), tensor
    read = settings_in_use(load_model_config(tmp_path / "again/iter_0000000" / MODEL_CONFIG_FILE))
    begins = {setting for setting, role in roles().items() if role is Role.start}
    for setting, value in settings_in_use(network).items():
        if setting not in begins:
            assert read[setting] == value, setting


@pytest.mark.parametrize("name", MODELS)
def test_both_commands_give_what_the_megatron_model_gives(
    ranks: RankPool, tmp_path: Path, text: Text, name: str
) -> None:
    check_both_commands(ranks, tmp_path, MODELS[name](), text)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return save_text(tmp_path_factory.mktemp("text"))


# Where nothing of the project can be imported: from a folder, saved again, and from a cache of the hub.
SCRIPT = """
import sys, pathlib, shutil, os
sys.modules["spikingbrain_train"] = sys.modules["tests"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, out = sys.argv[1], pathlib.Path(sys.argv[2])
ids = torch.arange(60).view(2, 30)

def load(name):
    AutoConfig.from_pretrained(name, trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()

model = load(folder)
with torch.no_grad():
    logits = model(ids).logits
model.save_pretrained(out / "saved_again")
model.train().gradient_checkpointing_enable()
model(ids, labels=ids).loss.backward()
assert all(p.grad is not None for p in model.parameters())
repository = out / "cache/hub/models--lab--hybrid"
commit = "0123456789abcdef0123456789abcdef01234567"
shutil.copytree(out / "saved_again", repository / "snapshots" / commit)
(repository / "refs").mkdir()
(repository / "refs/main").write_text(commit)
for name in (str(out / "saved_again"), "lab/hybrid"):
    with torch.no_grad():
        assert torch.equal(load(name)(ids).logits, logits), name
torch.save(logits, out / "logits.pt")
"""


@pytest.mark.slow
def test_a_folder_stands_alone_is_saved_again_and_pushed(ranks: RankPool, tmp_path: Path) -> None:
    network = MODELS["all three with sinks and biases"]()
    stored(ranks, network, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    run_where_the_project_is_not(SCRIPT, tmp_path / "exported", tmp_path)
    again = tmp_path / "saved_again"
    for path in (tmp_path / "exported").glob("*.py"):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    config = json.loads((again / "config.json").read_text())
    assert config["mixers"][1] == ["sliding_attention", "fixed_decay"]
    assert config["kinds"]["fixed_decay"] == {"max_slope": 0.5, "min_slope": 0.004}
    files = {path.name for path in again.glob("*.py")}
    assert {"fixed_decay_export.py", "relu_squared_export.py", "rounding_export.py"} < files
    assert "moe_spikingbrain.py" not in files, "no kind that the model does not have"


def refusal(ranks: RankPool, tmp_path: Path, network: ModelConfig, **options: Any) -> str:
    """The sentence of an export that is refused before anything is written."""
    stored(ranks, network, tmp_path / "megatron")
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SpikingBrainError) as error:
        export_checkpoint(tmp_path / "megatron", tmp_path / "export", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_kind_without_code_is_refused_with_what_to_add(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MIXERS["fixed_decay"], "hf_layers", {})
    told = refusal(ranks, tmp_path, model(feed_forwards=["dense"]))
    assert "no Hugging Face format holds linear attention layers of fixed decay; name the file that" in told
    assert "in exports in export_module of tests.plugins.fixed_decay.FixedDecayKind" in told


def test_a_transform_without_code_is_refused_unless_a_format_is_asked_for(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LINEAR_TRANSFORMS["rounding"], "hf_formats", ())
    network = with_rounding(model(mixers=["full"], feed_forwards=["dense"]), [Projection.qkv])
    told = refusal(ranks, tmp_path, network)
    assert "no export computes what rounding does to projections; name the file that computes it" in told
    assert "export_module of tests.plugins.rounding.RoundedWeightsKind" in told
    assert "write --format llama to export without" in told


def test_int8_weights_and_another_transform_of_one_projection_are_refused(
    ranks: RankPool, tmp_path: Path
) -> None:
    network = with_rounding(model(mixers=["full"], feed_forwards=["dense"]), [Projection.qkv])
    network.quantization = replace(network.quantization, projections=[Projection.qkv], group_size=8)
    told = refusal(ranks, tmp_path, network, format_name="spikingbrain")
    assert "cannot hold INT8 weights of projections that rounding is applied to" in told


def small() -> ModelConfig:
    return model(num_layers=1, mixers=["swa"], feed_forwards=["relu_squared"])


GOOD = Path(__file__).with_name("relu_squared_export.py").read_text()
BAD_FILES = {
    "another package": (f"import spikingbrain_train\n{GOOD}", "imports spikingbrain_train in line 1"),
    "not there": (f"{GOOD}\nfrom .constants import SCALE\n", "neither beside it nor a file of every export"),
    "from below": (f"{GOOD}\nfrom ..constants import SCALE\n", "write from .file import name"),
    "no Python": (f"{GOOD}\nclass :\n", "is no Python: "),
    "other name": (GOOD.replace('"relu_squared", Relu', '"relu", Relu'), 'feed_forwards knows no "relu_squ'),
    "other weights": (
        GOOD.replace("self.up_proj", "self.in_proj"),
        "model.layers.0.mlp.up_proj.weight is of shape [48, 32] by what weights and tensor_names declare, "
        "and the model that the code makes has none",
    ),
    "fails": (f"{GOOD}\nraise RuntimeError('no such processor')", "cannot make the model: no such processor"),
}


@pytest.fixture
def file_of_relu_squared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Gives the feed-forward another file for exports, in a package beside."""
    package = tmp_path / "packages" / f"code_{uuid.uuid4().hex}"  # modules of a process are found once
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)

    def give(text: str, name: str = "code") -> Path:
        (package / f"{name}.py").write_text(text)
        monkeypatch.setattr(FEED_FORWARDS["relu_squared"], "export_module", f"{package.name}.{name}")
        return package

    return give


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_an_export_cannot_carry_is_refused(
    ranks: RankPool, tmp_path: Path, file_of_relu_squared: Callable, case: str
) -> None:
    text, sentence = BAD_FILES[case]
    file_of_relu_squared(text)
    told = refusal(ranks, tmp_path, small())
    assert sentence in told and "relu_squared" in told


def test_a_file_that_is_missing_or_has_the_name_of_another_is_refused(
    ranks: RankPool, tmp_path: Path, file_of_relu_squared: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(ranks, small(), tmp_path / "megatron")
    file_of_relu_squared(GOOD, "mixers_gla_swa")
    with pytest.raises(SpikingBrainError, match="an export has another mixers_gla_swa.py; rename it"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    monkeypatch.setattr(FEED_FORWARDS["relu_squared"], "export_module", "no_package.code")
    with pytest.raises(SpikingBrainError, match="export_module=no_package.code, which cannot be found"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "export")


def test_files_beside_that_of_a_kind_travel_with_it(
    ranks: RankPool, tmp_path: Path, file_of_relu_squared: Callable
) -> None:
    network = small()
    expected = stored(ranks, network, tmp_path / "megatron")
    square = "        inside = self.scale * torch.relu(self.up_proj(self.mlp_fc1_spikes(x))).square()\n"
    text = GOOD.replace(square, square.replace("torch.relu(", "positive(").replace(".square()", " ** 2"))
    package = file_of_relu_squared(f"{text}\nfrom .positive_part import positive  # noqa: E402\n")
    (package / "positive_part.py").write_text("def positive(x):\n    return x.clamp_min(0)\n")
    export_checkpoint(tmp_path / "megatron", tmp_path / "with_two_files")
    assert (tmp_path / "with_two_files/positive_part.py").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with_two_files", trust_remote_code=True)
    check(loaded.eval(), expected)


def test_an_import_without_the_package_of_a_kind_names_it(ranks: RankPool, tmp_path: Path) -> None:
    stored(ranks, with_rounding(model(), [Projection.qkv]), tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    config["mixers"][0] = ["ribbons"]
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    with pytest.raises(SpikingBrainError, match="layers of ribbons.*--plugins package.module"):
        import_checkpoint(tmp_path / "export", tmp_path / "again")
    config["mixers"][0], config["kinds"]["rounding"]["step"] = ["fixed_decay"], -1.0
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json: kinds: rounding.step=-1.0 must be greater"):
        import_checkpoint(tmp_path / "export", tmp_path / "again")
    config["kinds"]["rounding"] = {"step": 0.5, "projections": ["mlp_fc1"]}
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="linear_transforms = .* names other linears than the settings"):
        import_checkpoint(tmp_path / "export", tmp_path / "again")
