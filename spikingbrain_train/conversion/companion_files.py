"""The small files that travel with a checkpoint's weights: configuration, tokenizer, licence."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class CompanionFiles:
    """Configuration, tokenizer and licence files of a Hugging Face folder.

    Code (``*.py``) is not among them: nothing of a source is ever executed. Neither is a symbolic link that
    leads out of the folder: its target is some file of this machine, which must not travel with a checkpoint
    under the name of a licence. In a Hugging Face cache, whose files are links, the blobs of the same model
    count as inside.
    """

    folder: Path
    names: list[str]
    """Relative to the folder."""
    left_behind: list[str]
    """A sentence for each link that is not followed."""

    def copy_to(self, target: Path) -> None:
        """Copy their contents into the existing folder ``target``."""
        for name in self.names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, target / name)


def find_companion_files(folder: Path) -> CompanionFiles:
    """The companion files in ``folder``, which may lack any of them."""
    names, left_behind = [], []
    for pattern in _COMPANIONS:
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            if not _lies_within(path, folder):
                left_behind.append(
                    f"{name} is a link out of {folder} and is not copied; put the file itself there if it "
                    "belongs to the model"
                )
            elif path.is_file():
                names.append(name)
            elif path.is_symlink():
                left_behind.append(
                    f"{name} is a link to nothing; copy the folder again if it belongs to the model"
                )
    return CompanionFiles(folder, names, left_behind)


def _lies_within(path: Path, folder: Path) -> bool:
    """Whether ``path``, with all links followed, lies in ``folder`` or belongs to it in a Hugging Face cache.

    There it is among the same model's blobs: ``snapshots/<revision>/config.json -> ../../blobs/<hash>``.
    """
    # os.path.realpath, because Path.resolve raises for a link to itself.
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    in_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    return root in real.parents or in_cache
