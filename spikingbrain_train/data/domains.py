"""Domains of documents: what they are about or where they come from, stored beside the tokens.

``<prefix>.domains.npy`` has one number a document, uint16, and the sidecar ``<prefix>.json`` the name of each
number under ``domains``. Long samples are packed of documents of one domain (SpikingBrain, arXiv 2509.05276,
section 3.4); which one a document is of is said when it is tokenized.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spikingbrain_train.data.preprocess_options import PreprocessOptions
from spikingbrain_train.data.raw_document import RawDocument
from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.index_format import DOMAINS_SUFFIX

DTYPE = np.uint16
MOST_DOMAINS = int(np.iinfo(DTYPE).max) + 1


@dataclass(frozen=True)
class Domains:
    """The domains of a dataset."""

    names: list[str]
    of_document: np.ndarray
    """Number of each document's domain [documents] uint16: the place of its name."""


class DomainTable:
    """Numbers for names of domains, in the order in which they come, the same for all outputs of a run."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """By number."""
        return list(self._numbers)

    def numbers(self, names: Iterable[str]) -> np.ndarray:
        """The number of each name [names] uint16; new names get new ones.

        Raises:
            DataError: there are more domains than numbers.
        """
        found = [self._numbers.setdefault(name, len(self._numbers)) for name in names]
        if len(self._numbers) > MOST_DOMAINS:
            raise DataError(
                f"documents are of more than {MOST_DOMAINS:,} domains: name a field of fewer values, or "
                "take --domain-from folder"
            )
        return np.array(found, dtype=DTYPE)


def domain_of(document: RawDocument, options: PreprocessOptions) -> str:
    """The domain of a document, as the options say where it stands.

    Raises:
        DataError: it is said nowhere; names the document.
    """
    if options.domain_key is not None and document.is_json:
        return document.label(options.domain_key)
    if options.domain_from == "file":
        return document.file
    if options.domain_from == "folder":
        return str(Path(document.file).parent)
    raise DataError(
        f"{document.origin}: it has no field {options.domain_key} for --domain-key: add --domain-from folder "
        "(or file), which documents without fields take then"
    )


def read_domains(prefix: str, documents: int) -> Domains | None:
    """The domains of the dataset at ``prefix``, None where none were stored.

    Args:
        prefix: path without suffix.
        documents: that it has.

    Raises:
        DataError: the files are damaged or of different runs.
    """
    path = f"{prefix}{DOMAINS_SUFFIX}"
    if not os.path.exists(path):
        return None
    again = "preprocess again with --overwrite"
    try:
        numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        names = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8")).get("domains")
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise DataError(f"{path} does not say the domains of {prefix} ({error}): {again}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{prefix}.json does not name the domains that {path} counts: {again}")
    if numbers.dtype != DTYPE or numbers.shape != (documents,):
        raise DataError(
            f"{path} is of another run: it has {numbers.size:,} domains for {documents:,} documents; {again}"
        )
    if documents and int(numbers.max()) >= len(names):
        raise DataError(f"{path} counts more domains than the {len(names)} of {prefix}.json: {again}")
    return Domains(names, numbers)
