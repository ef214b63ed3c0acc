"""Settings and choices as text for a terminal: all of them in a line each, or all about one."""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spikingbrain_train.config.docstrings import summary
from spikingbrain_train.config.manual import SectionEntry, SettingEntry
from spikingbrain_train.config.yaml_files import conf_folder
from spikingbrain_train.errors import ConfigurationError

OVERVIEW_OF_TRAIN = """\
Train a SpikingBrain hybrid: one stage (alignment or continual pretraining) of
one model, described by one config.

Usage
  spikingbrain-train [group=choice ...] [name=value ...]         one rank
  spikingbrain-train --nproc-per-node 8 [group=choice ...] ...   a rank a device
  torchrun --nproc-per-node 8 -m spikingbrain_train train ...    the same
  spikingbrain-plan [--json] [group=choice ...] [name=value ...] what it will take

Examples
  # what would run: does it fit the GPUs, for how many hours, which layers where
  spikingbrain-plan experiment=spikingbrain_7b_8k cluster=c550
  # the same for the last rank of 4096, whose share of the model is built
  spikingbrain-train experiment=spikingbrain_76b_128k cluster=metax \\
      dry_run=true dry_run_rank=4095
  # a tiny hybrid from random weights on the CPU
  spikingbrain-train model=tiny_hybrid cluster=cpu stage.seq_length=256 \\
      'data.train=[data/train]' output_dir=outputs/tiny
  # stage 1: align the swapped mixers with the dense source
  spikingbrain-train --nproc-per-node 2 experiment=smollm2_align
  # stage 2: continual pretraining from it; started again, it goes on
  spikingbrain-train --nproc-per-node 2 experiment=smollm2_cpt parallel=dp_zero1
  # a run as a checkpoint has stored it, elsewhere and with another rate
  spikingbrain-train --config outputs/smollm2/cpt output_dir=outputs/again \\
      optimizer.lr=1e-4
  # a sweep: four runs, each in a folder of outputs/sweep; --submit for Slurm
  spikingbrain-train --multirun experiment=smollm2_cpt optimizer.lr=1e-4,3e-4 \\
      seed=1,2 output_dir=outputs/sweep
  spikingbrain-train --multirun experiment=smollm2_cpt seed=1,2 \\
      output_dir=outputs/sweep --submit 'sbatch scripts/slurm/nvidia.sbatch'

More
  --help=stage             all about one section or group of choices
  --help=optimizer.lr      all about one setting
  --help=model=tiny_76b    what one choice says
  --cfg job                the config that this command line makes, as YAML
  --config FILE            take the run_config.yaml that a checkpoint stores
  --hydra-help             the flags of Hydra, which composes the config

Exit codes: 0 done; 2 wrong, with a sentence; 3 NaN or infinity met, nothing
saved; 75 asked to stop (SIGTERM, SIGUSR1, Ctrl-C) and saved: start again to go
on."""

FROM_CHECKPOINT = "from checkpoint.load"
"""The value of a setting that the checkpoint of a run will bring."""

_LONGEST = 120  # columns: longer lines are hard to read
_NAMES = 34  # columns of name=value
_IN_FULL = 20  # settings up to which a section is shown with those in it in full
_LONG_VALUE = 24


def width_of_terminal() -> int:
    """Columns that text may take."""
    return max(60, min(_LONGEST, shutil.get_terminal_size((100, 24)).columns))


@dataclass(frozen=True)
class Manual:
    """What can be said about the settings of a run, or of a recipe."""

    sections: list[SectionEntry]
    groups: Mapping[str, Mapping[str, str]]
    """The choices of every group, each with what it is for."""
    defaults: Mapping[str, str | None]
    """The choice of every group where nothing else is said."""
    values: Mapping[str, str]
    """Of the settings, as the command line makes them; those that are not here have their defaults."""
    of_run: bool = True
    """Whether runs have these settings, or recipes, which nothing resumes and a flag names."""

    def _chosen(self, group: str, choice: str) -> str:
        """How a command line chooses."""
        return f"{group}={choice}" if self.of_run else f"--{group} {choice}"

    def overview(self, introduction: str) -> str:
        """Groups with their choices, and every setting in a line, below ``introduction``."""
        marked = "; * is chosen by default" if any(self.defaults.values()) else ""
        lines = [
            introduction,
            "",
            f"Choices ({self._chosen('group' if self.of_run else 'conversion', 'choice')}{marked})",
        ]
        for group, choices in self.groups.items():
            names = [f"*{name}" if self.defaults.get(group) == name else name for name in choices]
            lines += _wrapped(", ".join(names), f"  {group:<11} ", " " * 14)
        lines += ["", "Settings (name=value; ??? has to be given, null means none)"]
        if FROM_CHECKPOINT in self.values.values():
            lines.append("Those without a value have that of the checkpoint in checkpoint.load.")
        for section in self.sections:
            if section.name:
                lines += ["", _shortened(f"{section.name}  {summary(section.text)}")]
            lines += [self._line(setting) for setting in section.settings]
        return "\n".join(lines)

    def about(self, topic: str) -> str:
        """All about one setting, one section, one group, or one choice of a group.

        Args:
            topic: ``optimizer.lr``, ``stage``, ``experiment``, ``model=tiny_76b``, or the end of a setting's
                name.

        Raises:
            ConfigurationError: there is nothing of that name; says what is near.
        """
        group, equals, choice = topic.partition("=")
        if equals and group in self.groups:
            return self._choice(group, choice)
        settings = {setting.name: setting for section in self.sections for setting in section.settings}
        sections = {section.name: section for section in self.sections if section.name}
        parts = [self._group(topic)] if topic in self.groups else []
        parts += [self._section(sections[topic])] if topic in sections else []
        found = [settings[topic]] if topic in settings else []
        if not parts and not found:
            found = [each for name, each in settings.items() if name.endswith(f".{topic}")]
            parts = [self._section(each) for name, each in sections.items() if name.endswith(f".{topic}")]
        parts += ["\n".join(self._in_full(setting)) for setting in found]
        if not parts:
            raise ConfigurationError(self._unknown(topic, [*settings, *sections, *self.groups]))
        return "\n\n".join(parts)

    def _line(self, setting: SettingEntry) -> str:
        value = self.values.get(setting.name, setting.default)
        name = f"  {setting.name.rpartition('.')[2]}"
        if value != FROM_CHECKPOINT:
            name += f"={_cut(value, _LONG_VALUE)}"
        return _shortened(f"{name:<{_NAMES}}  {summary(setting.text)}")

    def _in_full(self, setting: SettingEntry) -> Iterator[str]:
        value = self.values.get(setting.name, setting.default)
        yield from _wrapped(f"{setting.name} = {value}", "", "    ")
        for paragraph in setting.text.split("\n\n"):
            yield from _wrapped(paragraph, "    ", "    ")
        rows = [("takes", setting.takes)]
        if setting.default not in (value, "???"):
            rows.append(("default", setting.default))
        if self.of_run and setting.on_resume is not None:
            rows.append(("on resume", setting.on_resume))
        for name, words in rows:
            yield from _wrapped(words, f"    {name:<10} ", " " * 15)
        width = max(map(len, setting.choices), default=0)
        if any(setting.choices.values()):
            for name, words in setting.choices.items():
                yield from _wrapped(words, f"      {name:<{width}}  ", " " * (width + 8))

    def _section(self, section: SectionEntry) -> str:
        inside = [each for each in self.sections if each.name.startswith(f"{section.name}.")]
        is_short = len(section.settings) + sum(len(each.settings) for each in inside) <= _IN_FULL
        lines = [f"{section.name}: settings, {section.name}.<name>=<value>"]
        for paragraph in section.text.split("\n\n"):
            lines += _wrapped(paragraph, "    ", "    ")
        for setting in section.settings:
            lines += ["", *self._in_full(setting)]
        for each in inside:
            hint = "" if is_short else f" (--help={each.name} says more)"
            lines += ["", *_wrapped(f"{each.name}: {summary(each.text)}{hint}", "", "    ")]
            for setting in each.settings:
                lines += ["", *self._in_full(setting)] if is_short else [self._line(setting)]
        return "\n".join(lines)

    def _group(self, group: str) -> str:
        choices, default = self.groups[group], self.defaults.get(group)
        width = min(24, max(map(len, choices)))
        lines = [
            f"{group}: choices, {self._chosen(group, '<choice>')}"
            + (" (* is chosen by default)" if default else "")
        ]
        for name, words in choices.items():
            lines += _wrapped(
                words, f"  {'*' if name == default else ' '} {name:<{width}}  ", " " * (width + 6)
            )
        example = next(iter(choices))
        return "\n".join([*lines, f"  --help={group}={default or example} shows what is in one."])

    def _choice(self, group: str, choice: str) -> str:
        if choice not in self.groups[group]:
            near = _near(choice, list(self.groups[group]))
            names = ", ".join(self.groups[group])
            raise ConfigurationError(f"{group}={choice} does not exist{near} {group} is one of {names}")
        path = conf_folder() / group / f"{choice}.yaml"
        text = path.read_text(encoding="utf-8").rstrip()
        return f"# {self._chosen(group, choice)}: conf/{group}/{choice}.yaml\n{text}"

    def _unknown(self, topic: str, known: Sequence[str]) -> str:
        leaves = {name.rpartition(".")[2]: name for name in known}
        near = difflib.get_close_matches(topic, known, n=1) or [
            leaves[leaf] for leaf in difflib.get_close_matches(topic.rpartition(".")[2], list(leaves), n=1)
        ]
        hint = f"; did you mean --help={near[0]}?" if near else ";"
        tops = [name for name in dict.fromkeys([*self.groups, *known]) if "." not in name]
        return f"there is no setting or group {topic}{hint} there are {', '.join(dict.fromkeys(tops))}"


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ";"


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text.replace("``", ""),
        width_of_terminal(),
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]


def _shortened(line: str) -> str:
    return _cut(line.replace("``", "").rstrip(), width_of_terminal())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3].rstrip()}..."
