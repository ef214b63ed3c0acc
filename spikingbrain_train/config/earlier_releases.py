"""Values of settings that are written in another way now.

A stored run may still hold the old one; a command line and a YAML that a user writes may not.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from spikingbrain_train.config.blend import blend
from spikingbrain_train.config.linear_transforms import GateEncoding, Projection
from spikingbrain_train.config.model import OLD_MIXERS
from spikingbrain_train.config.rope_scaling import RopeType

RENAMED_VALUES = {
    "cluster.kernels.gated_linear_attention": {"recurrent": "naive"},
    "cluster.kernels.softmax_attention": {"reference": "naive"},
}
"""Setting -> old name of a value -> its name now."""
MOVED_SETTINGS = {"data.train_weights": "data.train=[{prefix: a, weight: 0.7}, {prefix: b, weight: 0.3}]"}
"""Setting of earlier releases -> how it is written now."""


def translate_model(model: Any) -> None:
    """Write a model that an earlier release stored as it is written now, in place.

    Layers of two branches had names of their own; a spiking gate was encoded in front of each matrix; rotary
    scaling was Llama 3's, and its factor of 1 was "off".
    """
    if not isinstance(model, DictConfig):
        return
    mixers, spiking, rope = model.get("mixers"), model.get("spiking"), model.get("rope_scaling")
    if isinstance(mixers, ListConfig):
        model.mixers = [OLD_MIXERS.get(entry, entry) if isinstance(entry, str) else entry for entry in mixers]
    if isinstance(spiking, DictConfig):
        projections = spiking.get("projections")
        if isinstance(projections, ListConfig) and Projection.gate.name in projections:
            spiking.setdefault("gate_encoding", GateEncoding.each_matrix.name)
    if isinstance(rope, DictConfig) and "rope_type" not in rope and rope.get("factor", 1) != 1:
        rope["rope_type"] = RopeType.llama3.name


def _translate_stage(stage: Any) -> None:
    """Distillation was a weight of continual pretraining and is a stage of its own; 0 was its "off"."""
    if not isinstance(stage, DictConfig):
        return
    distillation = stage.get("distillation")
    if not isinstance(distillation, DictConfig):
        return
    if not distillation.get("weight"):
        distillation["weight"] = None
    elif stage.get("kind", "cpt") == "cpt":
        stage["kind"] = "distill"


def _translate_data(data: Any) -> None:
    """Weights stood in a list of their own, one for each prefix."""
    if not isinstance(data, DictConfig) or "train_weights" not in data:
        return
    train, weights = data.get("train") or [], data.get("train_weights")
    if weights is None or len(weights) == len(train):
        data.train = blend(list(train), weights)
        del data["train_weights"]


def translate_run(stored: DictConfig) -> None:
    """Give the values of a run that an earlier release stored the names that they have now, in place."""
    translate_model(stored.get("model"))
    _translate_stage(stored.get("stage"))
    _translate_data(stored.get("data"))
    for setting, renamed in RENAMED_VALUES.items():
        value = OmegaConf.select(stored, setting)
        if value in renamed:
            OmegaConf.update(stored, setting, renamed[value])
