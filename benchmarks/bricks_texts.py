"""Texts of seven kinds for benchmarks/bricks.py, each an ability of a model; none is kept in the project.

They come with Python or in Debian packages of plain text, so nobody needs a hub.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.conversion_texts import KINDS, debian_texts, write_sample
from spikingbrain_train.storage.durable_files import write_text_durably

_LICENCES = Path("/usr/share/common-licenses")
_SECTION = 2000
"""Characters, about."""


def _sections(texts: Iterable[str]) -> Iterator[str]:
    """Texts in pieces that end at a line, so that a book gives many."""
    for text in texts:
        piece, length = [], 0
        for line in text.splitlines(keepends=True):
            piece.append(line)
            length += len(line)
            if length >= _SECTION:
                yield "".join(piece)
                piece, length = [], 0
        yield "".join(piece)


def _code() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def _german() -> Iterator[str]:
    """Without the frames of its tables, which are of no language."""
    for text in debian_texts("debian-reference-de", "usr/share/debian-reference", (".txt",)):
        lines = text.splitlines(keepends=True)
        yield "".join(line for line in lines if not line.lstrip().startswith(("|", "+")))


def _law() -> Iterator[str]:
    """Licences, each once: names without a number are links."""
    texts = [
        path.read_text(encoding="utf-8") for path in sorted(_LICENCES.iterdir()) if not path.is_symlink()
    ]
    yield from (text for text in texts if len(text) > 3000)


ABILITIES: dict[str, Callable[[], Iterator[str]]] = {
    "code": _code,
    "maths": lambda: debian_texts("pari-doc", "usr/share/pari/doc", ("usersch3.tex", "tutorial-mf.tex")),
    "german": _german,
    "law": _law,
    "verse": lambda: debian_texts("fortunes", "usr/share/games/fortunes", ("songs-poems",)),
    "essays": KINDS["essays"],
    "git": KINDS["git"],
}
"""Modules of Python's library, LaTeX of a manual of number theory, a German handbook, licences, songs and
poems, political essays, the manual of git."""


def write_ability(name: str, folder: Path, held_out: int, trained: int) -> None:
    """Write ``<name>.jsonl`` to measure on and ``<name>_train.jsonl`` of other sections; always the same.

    Args:
        name: of :data:`ABILITIES`.
        folder: for both.
        held_out: characters to measure on, about.
        trained: characters to train on, as far as there are so many.

    Raises:
        DataError: a package cannot be fetched here.
    """
    measured = folder / f"{name}.jsonl"
    if measured.is_file():
        return
    everything = folder / f".{name}.jsonl"
    write_sample(_sections(ABILITIES[name]()), everything, held_out + trained)
    lines, length, cut = everything.read_text(encoding="utf-8").splitlines(keepends=True), 0, 0
    while cut < len(lines) and length < held_out:
        length += len(json.loads(lines[cut])["text"])
        cut += 1
    write_text_durably(folder / f"{name}_train.jsonl", "".join(lines[cut:]))
    write_text_durably(measured, "".join(lines[:cut]))
    everything.unlink()
