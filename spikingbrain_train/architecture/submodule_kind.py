"""What kinds of mixers and of feed-forwards have in common: a name, a spec, and settings."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.sections import section_of
from spikingbrain_train.config.setting import leaves


class SubmoduleKind(ABC):
    """One kind of a layer's submodules. Everything that is known of it outside its module is asked here."""

    name: str
    """How ``model.mixers`` or ``model.feed_forwards`` calls it."""
    words: str
    """What its layers are called in sentences: ``mixture-of-experts layers``; by default by its name."""
    spec: str
    """``package.module:function`` that makes its spec in a layer; imported when a model is built."""
    section: str | None = None
    """Where the settings of a kind from outside stand in a model: ``model.<section>``."""
    section_type: type | None = None
    """The dataclass of those settings, every field with a default."""
    is_of_the_source: bool = False
    """Whether a dense source has it in every layer."""
    hf_layers: Mapping[str, str] = {}
    """What the Hugging Face formats that can hold it call it, by format."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "words" not in vars(cls) and hasattr(cls, "name"):
            cls.words = f"{cls.name} layers"

    def check(self, model: ModelConfig) -> None:
        """Its settings, in a model that has it. Raises ConfigurationError."""

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Its heads, channels and experts against the degrees that split them. Raises ConfigurationError."""

    def all_settings(self, model: ModelConfig) -> set[str]:
        """Dotted names of the model's settings that are there for it, and for others that name them, too."""
        return set() if self.section is None else set(leaves(self.own_settings(model), f"{self.section}."))

    def own_settings(self, model: ModelConfig) -> Any:
        """The settings in its section."""
        assert self.section is not None, f"{self.name} has no section"
        return section_of(model, self.section)

    def settings(self, model: ModelConfig) -> set[str]:
        """Those of them that have a part in it, with the values that others have."""
        return self.all_settings(model)

    def values_of_nulls(self, model: ModelConfig) -> dict[str, Any]:
        """What those of its settings stand for that can be null, by dotted name."""
        return {}

    def describe(self, model: ModelConfig) -> str | None:
        """A few words on its settings for plans and reports: ``window 4096``."""
        return None
