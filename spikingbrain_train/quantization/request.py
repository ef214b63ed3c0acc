"""What spikingbrain-quantize is asked for, without torch: which linears get what, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.require import divisors, either
from spikingbrain_train.errors import CheckpointError, ConfigurationError
from spikingbrain_train.hf import QUANT_METHOD, QUANTIZATION_FILE
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

REPORT_FILE = "quantization.json"
PICTURE_FILE = "quantization.png"
SPIKES, INT8, INT16, FLOAT = "spikes", "int8", "int16", "float"
"""What linears make of their input: see hf/quantization_w8aspike.py."""

_LINEARS: Mapping[Projection, Mapping[str, bool]] = {
    Projection.qkv: {"q_proj": True, "k_proj": True, "v_proj": True},
    Projection.gate: {"gk_proj.0": True, "gk_proj.1": False, "gk_proj": True, "g_proj": True},
    Projection.attention_output: {"o_proj": True},
    Projection.mlp_fc1: {"gate_proj": True, "up_proj": True},
    Projection.mlp_fc2: {"down_proj": True},
}
"""Linears of an export by what they project, and whether spikes go in front of each where they do."""
_HEAD = "lm_head"
_HOLDS = ("gla_swa", "spikingbrain")
"""Model types whose modelling code multiplies by INT8 weights."""


class Method(str, Enum):
    """How codes are found."""

    plain = "plain"
    """The next one of every weight."""
    gptq = "gptq"
    """Those whose errors make up for each other on the calibration text (arXiv 2210.17323)."""


class Scales(str, Enum):
    """How plain rounding finds the scale of a group."""

    calibrated = "calibrated"
    """The best of a few on the calibration text."""
    largest = "largest"
    """That of the largest weight: what training with model.quantization sees."""


class Layout(str, Enum):
    """How a quantised model is written."""

    int8 = "int8"
    """Tensors that are INT8, which the code in the folder multiplies as integers."""
    w8aspike = "w8aspike"
    """As published: floats, and beside them the scales that the published class rounds them to."""


PUBLISHED_PROJECTIONS = (Projection.qkv, Projection.gate, Projection.attention_output, Projection.mlp_fc1)
"""Where the published W8ASpike class multiplies spikes by INT8 weights."""


@dataclass(frozen=True)
class QuantizeRequest:
    """A checked command line."""

    model: Path
    is_checkpoint: bool
    output: Path
    overwrite: bool
    trust_remote_code: bool
    calibration_data: Sequence[str]
    samples: int
    seq_length: int
    data: Sequence[str]
    max_windows: int | None
    method: Method
    scales: Scales
    group_size: int | None
    """None is a whole row."""
    projections: Sequence[Projection]
    spike_projections: Sequence[Projection]
    k: float
    keys_and_values: bool
    embeddings: bool
    layout: Layout
    device: str
    dtype: str
    vocab_size: int
    """Of the model."""

    def linears(self) -> dict[str, str]:
        """Name of a linear -> what it makes of its input."""
        found = {}
        for projection in self.projections:
            for name, may_spike in _LINEARS[projection].items():
                spikes = may_spike and projection in self.spike_projections
                found[name] = SPIKES if spikes else INT8 if may_spike else FLOAT
        if self.embeddings:
            found[_HEAD] = INT16
        return found

    def quantization_config(self) -> dict[str, Any]:
        """The key of config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "group_size": self.group_size,
            "linears": self.linears(),
            "k": self.k,
            "embeddings": self.embeddings,
            "keys_and_values": self.keys_and_values,
        }

    def settings(self) -> dict[str, Any]:
        """All of it for the report."""
        values = asdict(self)
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def check_holds(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a folder's code has no INT8 weights, or its weights are INT8 already."""
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{folder} is quantised already, as its {CONFIG_FILE} says; name the folder that it was made of"
        )
    for entry in config.get("linear_transforms") or []:
        raise CheckpointError(
            f"{folder} transforms weights or inputs of linears by {entry['name']}, which INT8 weights would "
            f"take the place of; quantise a model without it"
        )
    if config.get("model_type") not in _HOLDS:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: model_type {config.get('model_type')} has no modelling code for INT8 "
            f"weights; quantise a hybrid that spikingbrain-export wrote ({', '.join(_HOLDS)})"
        )


def check_code(folder: Path) -> None:
    """Raise CheckpointError where the code in an export is from before there were INT8 weights."""
    if not (folder / QUANTIZATION_FILE).is_file():
        raise CheckpointError(
            f"{folder} carries modelling code of an earlier release, without {QUANTIZATION_FILE}; export the "
            f"checkpoint again, or name the checkpoint itself with --model"
        )


def check_group_size(group_size: int | None, widths: Mapping[str, int]) -> None:
    """Raise ConfigurationError where a group does not divide the inputs of a linear that is wider.

    Args:
        group_size: None is a whole row.
        widths: inputs of linears by their names.
    """
    if group_size is None:
        return
    wide = {name: width for name, width in widths.items() if width > group_size}
    for name, width in wide.items():
        if width % group_size:
            common = [each for each in divisors(width) if all(other % each == 0 for other in wide.values())]
            raise ConfigurationError(
                f"--group-size {group_size} does not divide the {width} inputs of {name}; what divides those "
                f"of all linears is {either(common)}, or take --group-size row"
            )


def widths_of(config: Mapping[str, Any], linears: Mapping[str, str]) -> dict[str, int]:
    """Inputs of the linears of a folder, of those that are asked for."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    gate = config.get("linear_attention") or config
    others = {
        "o_proj": heads * head_dim,
        "down_proj": config["intermediate_size"],
        "gk_proj.1": gate.get("gate_low_rank_dim", 16),
    }
    found = {name: others.get(name, hidden) for name in linears}
    if "down_proj" in linears and "moe" in config.get("feed_forwards", ()):
        experts = config["moe"]
        width = experts["moe_intermediate_size"] or config["intermediate_size"]
        found["down_proj of experts"] = width
        if experts["num_shared_experts"]:
            found["down_proj of shared experts"] = width * experts["num_shared_experts"]
    return found
