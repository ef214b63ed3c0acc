"""What every kind that a model is made of has: a name, and settings of the model that are there for it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.sections import section_of
from spikingbrain_train.config.setting import leaves

OWN_FORMAT = "spikingbrain"
"""What kinds call this project's own Hugging Face format, which holds whatever has an ``export_module``."""


class Kind(ABC):
    """One kind of something. Everything that is known of it outside its module is asked here."""

    name: str
    """How configs call it."""
    section: str | None = None
    """Where its settings stand in a model, ``model.<section>``; exports hold them by the kind's name."""
    section_type: type | None = None
    """The dataclass of those settings for a kind from outside, every field with a default."""
    export_module: str | None = None
    """``package.module`` of the file that computes it in exports of this project's own format; they carry it.

    It imports nothing but torch, transformers and files of the export, and registers the kind under its name:
    see hf/kinds_spikingbrain.py. Without one, no such export holds the kind."""
    tensor_names: Mapping[str, str] = {}
    """Role of a weight -> its name in those exports below what owns it, for roles that a dense source lacks:
    ``{"out_norm": "g_norm.weight"}``."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls) and "export_module" not in vars(cls):
            cls.export_module = None  # what is another kind is not computed by the same file

    def own_settings(self, model: ModelConfig) -> Any:
        """The settings in its section."""
        assert self.section is not None, f"{self.name} has no section"
        return section_of(model, self.section)

    def all_settings(self, model: ModelConfig) -> set[str]:
        """Dotted names of the model's settings that are there for it, and for others that name them, too."""
        return set() if self.section is None else set(leaves(self.own_settings(model), f"{self.section}."))

    def settings(self, model: ModelConfig) -> set[str]:
        """Those of them that have a part in it, with the values that others have."""
        return self.all_settings(model)
