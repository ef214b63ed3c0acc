"""What ``spikingbrain-preprocess`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.launch import available_cores

_WORKERS_PER_CORE = 4
_FEW_WORKERS = 8
"""As many workers may be asked for on every machine, on large ones so many for each core."""


@dataclass(frozen=True)
class PreprocessOptions:
    """What to tokenize and where to put it."""

    inputs: list[str]
    """Files, folders, globs, or ``pydoc-topics``."""
    output_prefix: str
    """Path of the dataset without .bin/.idx."""
    tokenizer: str
    """Hugging Face tokenizer folder or sentencepiece .model."""
    text_key: str = "text"
    """Field of a JSON line that holds the text."""
    valid_fraction: float = 0.0
    """Share of documents to hold out, in [0, 1). Above 0 the datasets are <prefix>_train and
    <prefix>_valid."""
    workers: int = 1
    """Tokenizing processes."""
    max_text_chars: int | None = None
    """Cut plain-text files at blank lines into documents of at most that many characters."""
    skip_bad_documents: bool = False
    """Count malformed or empty documents instead of stopping at the first."""
    overwrite: bool = False
    """Replace datasets that already lie at the output prefix."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ConfigurationError(
                f"--valid-fraction is {self.valid_fraction}: give a number from 0 up to below 1"
            )
        if self.workers < 1:
            raise ConfigurationError(f"--workers is {self.workers}: give at least 1")
        most = max(_FEW_WORKERS, _WORKERS_PER_CORE * available_cores())
        if self.workers > most:
            raise ConfigurationError(
                f"--workers is {self.workers}: on {available_cores()} cores give at most {most}"
            )
        if self.max_text_chars is not None and self.max_text_chars < 1:
            raise ConfigurationError(f"--max-text-chars is {self.max_text_chars}: give at least 1")
        if not Path(self.output_prefix).name or self.output_prefix.endswith("/"):
            raise ConfigurationError(
                f"--output-prefix {self.output_prefix!r} ends in no file name: append one"
            )

    @property
    def output_prefixes(self) -> list[str]:
        """The datasets that will exist at the end."""
        if self.valid_fraction > 0:
            return [f"{self.output_prefix}_train", f"{self.output_prefix}_valid"]
        return [self.output_prefix]
