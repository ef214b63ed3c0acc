"""Texts of several kinds that benchmarks/conversion_quality.py evaluates on, none of them trained on.

Some come from Debian packages of plain text; nothing of them is kept in the project.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import zstandard

from spikingbrain_train.errors import DataError

DOCUMENT_CHARACTERS = 8000
"""Longer documents are cut there, so that a small set has many."""
_SEED = 0


def _debian(package: str, folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
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
    "essays": lambda: _debian("anarchism", "usr/share/doc/anarchism/markdown", (".md",)),
    "git": lambda: _debian("git-doc", "usr/share/doc/git-doc", (".txt",)),
    "topics": lambda: iter(topics[key] for key in sorted(topics)),
}
"""Essays, the manual of another project, Python's topics."""


def json_lines(path: Path) -> Iterator[str]:
    """The field "text" of every line, of a file compressed with zstd or not."""
    with zstandard.open(path, "rt") if path.suffix == ".zst" else path.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


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
