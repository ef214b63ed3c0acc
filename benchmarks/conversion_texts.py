"""Texts of several kinds that benchmarks/conversion_quality.py evaluates on, none of them trained on.

Some come from Debian packages of plain text; nothing of them is kept in the project.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import zstandard

from spikingbrain_train.errors import DataError

DOCUMENT_CHARACTERS = 8000
"""Longer documents are cut there, so that a small set has many."""
_SEED = 0
_NGRAM = 13
"""Words in a row that two texts rarely share by chance (GPT-3, arXiv 2005.14165, appendix C)."""
_WORD = re.compile(r"\w+")
MOST_KNOWN = 0.1
"""Share of a text's n-grams that may occur in the text to train on; manuals of one project share a few."""


def debian_texts(package: str, folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """The text files of a Debian package.

    Raises:
        DataError: it cannot be fetched here.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for tool, arguments in (
            ("apt-get", ["download", package]),
            ("dpkg-deb", ["-x", "PACKAGE", "unpacked"]),
        ):
            if shutil.which(tool) is None:
                raise DataError(f"{package} is a Debian package, and there is no {tool} here")
            files = [str(path) for path in Path(scratch).glob("*.deb")]
            command = [tool, *(files[0] if word == "PACKAGE" else word for word in arguments)]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no word"])[-1]
                raise DataError(f"{' '.join(command)} failed: {last}")
        for path in sorted((Path(scratch) / "unpacked" / folder).rglob("*")):
            if path.is_file() and path.name.removesuffix(".gz").endswith(suffixes):
                raw = path.read_bytes()
                raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
                yield raw.decode("utf-8", errors="replace")


KINDS: dict[str, Callable[[], Iterator[str]]] = {
    "essays": lambda: debian_texts("anarchism", "usr/share/doc/anarchism/markdown", (".md",)),
    "git": lambda: debian_texts("git-doc", "usr/share/doc/git-doc", (".txt",)),
}
"""Essays, and the manual of another project than those that are trained on."""


def json_lines(path: Path) -> Iterator[str]:
    """The field "text" of every line, of a file compressed with zstd or not."""
    with zstandard.open(path, "rt") if path.suffix == ".zst" else path.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def sample_once(text: Path, path: Path, characters: int) -> None:
    """:func:`write_sample` of a file of JSON lines, unless it is there."""
    if not path.is_file():
        write_sample(json_lines(text), path, characters)


def write_sample(documents: Iterable[str], path: Path, characters: int) -> None:
    """Write some documents as JSON lines, about ``characters`` of them in all, always the same ones."""
    kept = [text[:DOCUMENT_CHARACTERS] for text in documents if len(text) > 1000]
    random.Random(_SEED).shuffle(kept)
    chosen, length = [], 0
    for text in kept:
        if length >= characters:
            break
        chosen.append(text)
        length += len(text)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
    temporary.replace(path)


def check_unseen(name: str, documents: Iterable[str], trained: Iterable[str]) -> float:
    """The share of a text's n-grams of words that occur in the text to train on.

    Raises:
        DataError: it is more than a tenth.
    """
    numbers: dict[str, int] = {}
    known = np.unique(np.concatenate([_ngrams(document, numbers) for document in documents]))
    found = np.zeros(len(known), bool)
    for document in trained:
        ngrams = _ngrams(document, numbers)
        places = np.searchsorted(known, ngrams).clip(max=len(known) - 1)
        found[places[known[places] == ngrams]] = True
    share = float(found.mean())
    if share > MOST_KNOWN:
        raise DataError(
            f"{share:.0%} of the runs of {_NGRAM} words of the text {name} occur in the text to train on; "
            "measure on another one"
        )
    return share


def _ngrams(document: str, numbers: dict[str, int]) -> np.ndarray:
    """A hash of each n-gram: [N] uint64. ``numbers`` gives every word one, and learns new ones."""
    found = [numbers.setdefault(word, len(numbers)) for word in _WORD.findall(document.lower())]
    words = np.array(found, dtype=np.uint64)
    hashes = np.zeros(max(0, len(words) - _NGRAM + 1), np.uint64)
    for place in range(_NGRAM):  # wraps around, as is wanted
        hashes = hashes * np.uint64(1099511628211) + words[place : len(hashes) + place] + np.uint64(1)
    return hashes
