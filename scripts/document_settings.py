"""Every setting of runs and recipes as docs/settings.md, written from the dataclasses: `make settings`.

With --check it writes nothing and says whether the page is out of date.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spikingbrain_train.config.asked import manual_of_conversion, manual_of_run  # noqa: E402
from spikingbrain_train.config.compose import compose_run  # noqa: E402
from spikingbrain_train.config.help_text import FROM_CHECKPOINT, Manual  # noqa: E402
from spikingbrain_train.config.manual import SectionEntry, SettingEntry  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"

HEAD = """\
# Settings

Written by `make settings` from what stands beside the settings in `spikingbrain_train/config/`; `make lint`
fails where it is out of date. In a terminal, `spikingbrain-train --help` lists them with the values that a
command line gives them, and `spikingbrain-train --help=stage` or `spikingbrain-train --help=optimizer.lr`
tell all about a section or a setting.

A run is composed of one choice from every group (`stage=align`) and single settings on top
(`optimizer.lr=1e-4`). "On resume" says what a run that goes on from its own checkpoint makes of another
value. Defaults are those of a run that says nothing; `???` has to be given. The model comes from
`checkpoint.load` unless `model` names a size; its defaults are those of a preset that leaves the setting out.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    written = page()
    if parser.parse_args().check:
        is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == written
        if not is_current:
            print(f"docs/{PAGE.name} does not say what the settings do: run `make settings`", file=sys.stderr)
        return int(not is_current)
    temporary = PAGE.with_name(f"{PAGE.name}.tmp")
    temporary.write_text(written, encoding="utf-8")
    os.replace(temporary, PAGE)
    return 0


def page() -> str:
    """The page as it has to be."""
    run, recipe = manual_of_run(compose_run([])), manual_of_conversion()
    of_models = {section.name.removeprefix("model.") for section in run.sections}
    lines = [HEAD, "## Groups and their choices", ""]
    for group in run.groups:
        lines += [*_choices(run, group), ""]
    for section in run.sections:
        lines += [*_section(run, section, section.name or "The run itself"), ""]
    lines += [
        "## Recipes of conversions",
        "",
        "What `spikingbrain-convert import --conversion` follows: a file of `conf/conversion/`, or any YAML",
        "file with these settings, and changes behind it (`sliding_window=2048`). Those of a model's layers",
        "are as above, without `model.` in front.",
        "",
        *_choices(recipe, "conversion"),
        "",
    ]
    for section in recipe.sections:
        if section.name not in of_models or not section.name:
            known = {f"model.{entry.name}" for entry in section.settings} & set(run.values)
            own = [entry for entry in section.settings if f"model.{entry.name}" not in known]
            lines += [*_section(recipe, section, section.name or "The recipe itself", own), ""]
    return "\n".join(lines).rstrip() + "\n"


def _choices(manual: Manual, group: str) -> Iterator[str]:
    yield f"### {group}"
    yield ""
    yield "| choice | what it is |"
    yield "|---|---|"
    for name, words in manual.groups[group].items():
        default = " (default)" if manual.defaults.get(group) == name else ""
        yield f"| `{name}`{default} | {_cell(words)} |"


def _section(
    manual: Manual, section: SectionEntry, title: str, settings: list[SettingEntry] | None = None
) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    for paragraph in section.text.split("\n\n"):
        yield _markdown(paragraph)
        yield ""
    shown = section.settings if settings is None else settings
    if not shown:
        return
    yield "| setting | what it is | takes | default |" + (" on resume |" if manual.of_run else "")
    yield "|---|---|---|---|" + ("---|" if manual.of_run else "")
    for entry in shown:
        row = [f"`{entry.name}`", _description(entry), entry.takes, f"`{_default(entry, manual.values)}`"]
        row += [entry.on_resume or ""] if manual.of_run else []
        yield f"| {' | '.join(_cell(cell) for cell in row)} |"


def _default(entry: SettingEntry, values: Mapping[str, str]) -> str:
    value = values.get(entry.name, entry.default)
    return entry.default if value == FROM_CHECKPOINT else value


def _description(entry: SettingEntry) -> str:
    text = entry.text.replace("\n\n", "<br>")
    if any(entry.choices.values()):
        text += "".join(f"<br>`{name}`: {words}" for name, words in entry.choices.items())
    return text


def _cell(text: str) -> str:
    return _markdown(text).replace("|", "\\|").replace("\n", " ")


def _markdown(text: str) -> str:
    """One kind of backticks; what would be taken for a tag or for emphasis stands as it is."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    parts = text.split("`")
    for index in range(0, len(parts), 2):  # outside of code
        parts[index] = re.sub(r"<(?!br>)", "&lt;", parts[index]).replace("*", "\\*")
    return "`".join(parts)


if __name__ == "__main__":
    sys.exit(main())
