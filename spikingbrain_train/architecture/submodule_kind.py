"""What kinds of mixers and of feed-forwards have in common: a name, a spec, and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikingbrain_train.architecture.kind import OWN_FORMAT, Kind
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig


class SubmoduleKind(Kind):
    """One kind of a layer's submodules, named in ``model.mixers`` or ``model.feed_forwards``."""

    words: str
    """What its layers are called in sentences: ``mixture-of-experts layers``; by default by its name."""
    spec: str
    """``package.module:function`` that makes its spec in a layer; imported when a model is built."""
    sign: str
    """What stands for it where layers are shown in a line; by default the first letter of its name."""
    is_of_the_source: bool = False
    """Whether a dense source has it in every layer."""
    hf_layers: Mapping[str, str] = {}
    """What the Hugging Face formats that can hold it call it, by format. In this project's own, a kind that
    has an ``export_module`` goes by its name."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            named = vars(cls).get("hf_layers", {})
            own = {} if cls.export_module is None else {OWN_FORMAT: cls.name}
            cls.hf_layers = {**own, **named}
        if "words" not in vars(cls) and hasattr(cls, "name"):
            cls.words = f"{cls.name} layers"
        if "sign" not in vars(cls) and hasattr(cls, "name"):
            cls.sign = cls.sign_of(cls.name)

    @classmethod
    def sign_of(cls, name: str) -> str:
        """The sign of a kind that names none."""
        return name[0].upper()

    def check(self, model: ModelConfig) -> None:
        """Its settings, in a model that has it. Raises ConfigurationError."""

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Its heads, channels and experts against the degrees that split them. Raises ConfigurationError."""

    def values_of_nulls(self, model: ModelConfig) -> dict[str, Any]:
        """What those of its settings stand for that can be null, by dotted name."""
        return {}

    def describe(self, model: ModelConfig) -> str | None:
        """A few words on its settings for plans and reports: ``window 4096``."""
        return None
