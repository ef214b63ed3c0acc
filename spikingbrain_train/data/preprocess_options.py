"""What ``spikingbrain-preprocess`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from spikingbrain_train.data.encoders import TokenizerBackend
from spikingbrain_train.data.parquet import ALL
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.planning.launch import available_cores

_WORKERS_PER_CORE = 4
_FEW_WORKERS = 8
DOMAIN_SOURCES = ("file", "folder")
"""As many workers may be asked for on every machine, on large ones so many for each core."""


class LossOn(str, Enum):
    """Which tokens carry loss."""

    all = "all"
    """Every one, as in pretraining."""
    assistant = "assistant"
    """What the assistant says, and the token that ends its turn."""


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
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    chat_key: str | None = None
    """Field of a JSON line that holds a conversation instead, which the tokenizer's chat template renders."""
    domain_key: str | None = None
    """Field of a JSON line that names the domain of the document; ``meta.source`` is one inside another."""
    domain_from: str | None = None
    """``file`` or ``folder``: what a document lies in is its domain, where domain_key does not say it."""
    loss_on: LossOn = LossOn.all
    """Which tokens of a conversation are learnt."""
    seq_length: int | None = None
    """Tokens of the sequences that training will make of examples: how many are longer is then counted."""
    valid_fraction: float = 0.0
    """Share of documents to hold out, in [0, 1). Where something is held out, the datasets are <prefix>_train
    and <prefix>_valid."""
    valid_tokens: int | None = None
    """Tokens to hold out, as nearly as whole documents allow."""
    valid_token_fraction: float | None = None
    """Share of tokens to hold out, above 0 and below 1, as nearly as whole documents allow."""
    split_seed: int = 0
    """Another number holds other documents out."""
    workers: int | None = 1
    """Tokenizing processes; None are as many as are worth their start."""
    tokenizer_backend: TokenizerBackend = TokenizerBackend.auto
    """Which library makes tokens of text; the ids are those of the tokenizer."""
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
        self._check_split()
        if self.learns_answers and self.chat_key is None:
            raise ConfigurationError(
                "--loss-on assistant needs to know who speaks: name the field that holds the messages with "
                "--chat-key, e.g. --chat-key messages"
            )
        check_seq_length(self.seq_length)
        if self.seq_length is not None and not self.learns_answers:
            raise ConfigurationError(
                "--seq-length counts examples that are longer, which --loss-on assistant makes: leave it out"
            )
        if self.domain_from not in (None, *DOMAIN_SOURCES):
            raise ConfigurationError(f"--domain-from is {self.domain_from}: give file or folder")
        if self.workers is not None and self.workers < 1:
            raise ConfigurationError(f"--workers is {self.workers}: give at least 1")
        most = max(_FEW_WORKERS, _WORKERS_PER_CORE * available_cores())
        if self.workers is not None and self.workers > most:
            raise ConfigurationError(
                f"--workers is {self.workers}: on {available_cores()} cores give at most {most}"
            )
        if self.max_text_chars is not None and self.max_text_chars < 1:
            raise ConfigurationError(f"--max-text-chars is {self.max_text_chars}: give at least 1")
        if not Path(self.output_prefix).name or self.output_prefix.endswith("/"):
            raise ConfigurationError(
                f"--output-prefix {self.output_prefix!r} ends in no file name: append one"
            )

    def _check_split(self) -> None:
        if self.valid_tokens is not None and self.valid_tokens < 1:
            raise ConfigurationError(f"--valid-tokens is {self.valid_tokens}: give at least 1")
        if self.valid_token_fraction is not None and not 0.0 < self.valid_token_fraction < 1.0:
            raise ConfigurationError(
                f"--valid-token-fraction is {self.valid_token_fraction}: give a number above 0 and below 1"
            )
        if not 0 <= self.split_seed < 2**64:
            raise ConfigurationError(f"--split-seed is {self.split_seed}: give a number from 0 to 2**64 - 1")
        given = [
            flag
            for flag, value in (
                ("--valid-fraction", self.valid_fraction),
                ("--valid-tokens", self.valid_tokens),
                ("--valid-token-fraction", self.valid_token_fraction),
            )
            if value
        ]
        if len(given) > 1:
            raise ConfigurationError(
                f"{given[0]} and {given[1]} each say how much is held out: give one of them"
            )

    @property
    def fields(self) -> list[str]:
        """Fields of a record that are read, the text or conversation first."""
        if self.chat_key is not None:
            return [self.chat_key, ALL]
        return [self.text_key] if self.domain_key is None else [self.text_key, self.domain_key]

    @property
    def names_domains(self) -> bool:
        """Whether the domains of documents are stored."""
        return self.domain_key is not None or self.domain_from is not None

    @property
    def learns_answers(self) -> bool:
        """Whether loss is on a part of the tokens, so that documents become examples."""
        return self.loss_on is LossOn.assistant

    @property
    def holds_out_tokens(self) -> bool:
        """Whether a number of tokens is held out, and not one of documents."""
        return self.valid_tokens is not None or self.valid_token_fraction is not None

    @property
    def holds_out(self) -> bool:
        """Whether some documents become a dataset for evaluation."""
        return self.valid_fraction > 0 or self.holds_out_tokens

    @property
    def output_prefixes(self) -> list[str]:
        """The datasets that will exist at the end."""
        if self.holds_out:
            return [f"{self.output_prefix}_train", f"{self.output_prefix}_valid"]
        return [self.output_prefix]


def check_seq_length(seq_length: int | None) -> None:
    """Of --seq-length, also beside --describe. Raises ConfigurationError."""
    if seq_length is not None and seq_length < 1:
        raise ConfigurationError(f"--seq-length is {seq_length}: give at least 1")
