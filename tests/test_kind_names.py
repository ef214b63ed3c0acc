"""What a kind of layer is called is known in its own files alone, so that another kind needs no others.

Looked for in the syntax tree: the names of kinds as strings (compared, looked up, listed, whatever is done
with them), the settings of kinds as attributes and in strings, and imports of their files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spikingbrain_train.architecture.feed_forwards import FEED_FORWARDS
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.architecture.mixers import MIXERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spikingbrain_train"

SOFTMAX = ("architecture/softmax_attention.py", "models/mixers/softmax_attention.py")
MOEFY = ("bricks/moefy.py", "bricks/moefy_command_line.py")
UPDATE = ("bricks/update_command_line.py", "bricks/changed_weights.py")
GROW = ("bricks/grow.py", "bricks/grow_command_line.py")
OWN_FILES: dict[str, tuple[str, ...]] = {
    "full": SOFTMAX,
    "swa": SOFTMAX,
    "gla": ("architecture/gated_linear_attention.py", "models/mixers/gated_linear_attention.py"),
    "gdn": ("architecture/gated_delta_rule.py", "models/mixers/gated_delta_rule.py"),
    "mamba": ("architecture/mamba.py", "models/mixers/mamba.py"),
    # spikingbrain-bricks moefy makes one of the other.
    "dense": ("architecture/dense.py", "models/feed_forwards/dense.py", *MOEFY),
    "no_mlp": ("architecture/no_mlp.py",),
    "moe": ("architecture/moe.py", "models/feed_forwards/moe/", *MOEFY, *GROW, *UPDATE),
    "spiking": (
        "architecture/spikes.py",
        "models/linears/spikes.py",
        "models/linears/spike_statistics.py",
        "spike_analysis/megatron.py",
        *SOFTMAX,
    ),
    "quantization": (
        "architecture/quantization.py",
        "models/linears/int8_weights.py",
        "models/linears/stored_scales.py",
        *SOFTMAX,
        "quantization/",
    ),
    "int8_inputs": ("architecture/int8_inputs.py", "models/linears/int8_inputs.py"),
    "q8_inputs": ("architecture/q8_inputs.py", "models/linears/q8_inputs.py"),
    "ternary": ("architecture/ternary.py", "models/linears/ternary_weights.py"),
    "lora": (
        "architecture/lora.py",
        "models/linears/lora.py",
        "bricks/adapters.py",
        "bricks/adapters_command_line.py",
        "bricks/compose.py",
        "bricks/peft_folder.py",
        "bricks/train_command_line.py",
        *UPDATE,
    ),
}
"""Description and torch modules of each kind; a folder ends in a slash."""

FILES_OF_ALL = (
    "config/model.py",  # classes and defaults of the settings of our own kinds
    "conversion/formats/",  # what Hugging Face formats call them
    "hf/",  # what exports carry: knows nothing of the package
)

SETTINGS = {
    "sliding_window": "swa",
    "gla": "gla",
    "gdn": "gdn",
    "mamba": "mamba",
    "moe": "moe",
    "spiking": "spiking",
    "quantization": "quantization",
    "int8_inputs": "int8_inputs",
    "q8_inputs": "q8_inputs",
    "ternary": "ternary",
    "lora": "lora",
}
"""Settings and sections of a model that are one kind's, and whose."""


ALLOWED = {
    ("config/run.py", "full"): "Verification.full: every byte of a checkpoint is looked at, not sizes alone",
    ("config/parallel.py", "full"): "Recompute.full: whole layers are computed again, as megatron-core says",
    ("models/transformer_config.py", "full"): "megatron-core's granularity of recomputation",
    ("models/transformer_config.py", "moe"): "a module that megatron-core can compute again",
    ("runtime/host_torch.py", "full"): "torch.full",
    ("pipelines/demo/report.py", "dense"): "a step of the demo: the dense source's Megatron copy",
    ("commands/parsers.py", "quantization"): "the command of that name",
    ("commands/programs.py", "quantization"): "the command of that name",
    ("quantization/quantize.py", "spiking"): "a key of config.json",
    ("quantization/request.py", "moe"): "a key of config.json",
    ("quantization/command_line.py", "spiking"): "W8ASpike has both: a checkpoint brings its k",
    ("config/earlier_releases.py", "spiking"): "a section that earlier releases wrote otherwise",
    ("evaluation/generation.py", "sliding_window"): "of a cache layer of transformers",
    ("spike_analysis/command_line.py", "spiking"): "what analyses that kind starts its analysis",
    ("bricks/command_line.py", "lora"): "lists the subcommands, those of adapters among them",
    ("bricks/command_line.py", "moe"): "lists the subcommands, moefy among them",
    ("bricks/command_line.py", "dense"): "lists the subcommands, moefy among them",
    ("bricks/partial_run.py", "lora"): "trains adapters or experts, and nothing else",
    ("bricks/partial_run.py", "moe"): "trains adapters or experts, and nothing else",
    ("spiking/codings.py", "ternary"): "a coding of counts as trains of spikes",
    ("conversion/window_convention.py", "sliding_window"): "a key of config.json",
}
"""(file, word): what the word is there, where it is no kind."""


@dataclass(frozen=True)
class Found:
    """A place that knows a kind."""

    file: str
    line: int
    word: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def names_in(source: str, file: str) -> Iterator[Found]:
    """Every place in ``source`` that knows a kind, own files and what is allowed included."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if node.value in OWN_FILES or node.value in SETTINGS:
                yield Found(file, node.lineno, node.value, f"the string {node.value!r}")
            for word in re.findall(r"\b(?:model\.)(\w+)|^(\w+)\.\w+$", node.value):
                if (setting := word[0] or word[1]) in SETTINGS:
                    yield Found(file, node.lineno, setting, f"the setting in {node.value!r}")
        elif isinstance(node, ast.Attribute) and node.attr in SETTINGS:
            yield Found(file, node.lineno, node.attr, ast.unparse(node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
            path = module.removeprefix("spikingbrain_train.").replace(".", "/")
            for kind, own in OWN_FILES.items():
                if any(path + ".py" == file_ or (path + "/").startswith(file_) for file_ in own):
                    yield Found(file, node.lineno, kind, f"import of {module}")


def is_at_home(found: Found) -> bool:
    kind = SETTINGS.get(found.word, found.word)
    homes = (*OWN_FILES.get(kind, ()), *FILES_OF_ALL)
    return any(found.file == home or (home.endswith("/") and found.file.startswith(home)) for home in homes)


def everything() -> list[Found]:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "train.py"]
    found = []
    for path in sorted(files):
        file = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).as_posix()
        found += names_in(path.read_text(encoding="utf-8"), file)
    return found


def test_every_kind_of_the_package_is_looked_for() -> None:
    kinds = {kind.name for registry in (MIXERS, FEED_FORWARDS, LINEAR_TRANSFORMS) for kind in registry}
    assert kinds == set(OWN_FILES)
    for own in OWN_FILES.values():
        assert all((PACKAGE / file).exists() for file in own), own


def test_no_file_but_its_own_knows_a_kind() -> None:
    strangers = [
        found for found in everything() if not is_at_home(found) and (found.file, found.word) not in ALLOWED
    ]
    assert not strangers, "\n".join(map(str, strangers))


def test_what_is_allowed_is_there() -> None:
    there = {(found.file, found.word) for found in everything()}
    assert not ALLOWED.keys() - there, "allowed and no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        'if layer.mixer == "gla": ...',
        'costs = {"dense": 1}["dense"]',
        "experts = model.moe.num_experts",
        'name = "moe.num_experts"',
        'raise ValueError(f"model.gla.gate={gate} is wrong")',
        "from spikingbrain_train.models.mixers.gated_linear_attention import GatedLinearAttention",
        "from spikingbrain_train.models.feed_forwards.moe.router import SequenceBalancedRouter",
    ],
)
def test_a_place_that_knows_a_kind_is_found(source: str) -> None:
    assert [found for found in names_in(source, "planning/costs.py") if not is_at_home(found)]


@pytest.mark.parametrize(
    "source", ['"""A docstring of gla."""', "config.stage.seq_length", 'print("the disk is full")', "x = moe"]
)
def test_other_words_are_let_pass(source: str) -> None:
    assert not list(names_in(source, "planning/costs.py"))
