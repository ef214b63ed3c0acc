"""What every kind that a model is made of has: a name, and settings of the model that are there for it."""

from __future__ import annotations

from abc import ABC
from typing import Any

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.sections import section_of
from spikingbrain_train.config.setting import leaves


class Kind(ABC):
    """One kind of something. Everything that is known of it outside its module is asked here."""

    name: str
    """How configs call it."""
    section: str | None = None
    """Where the settings of a kind from outside stand in a model: ``model.<section>``."""
    section_type: type | None = None
    """The dataclass of those settings, every field with a default."""

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
