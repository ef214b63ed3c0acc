"""``python -m spikingbrain_train <command> ...``: every command without an installed script."""

from __future__ import annotations

import difflib
import sys

from spikingbrain_train.commands.table import COMMANDS
from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.errors import ConfigurationError

_MODULE = "python -m spikingbrain_train"


def main() -> None:
    """Run the command that ``sys.argv`` names first; the rest of it is the command's own."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return
    with user_errors(same_on_all_ranks=True):
        command = next((command for command in COMMANDS if words[0] in (command.name, command.program)), None)
        if command is None:
            names = [command.name for command in COMMANDS]
            near = difflib.get_close_matches(words[0].removeprefix("spikingbrain-"), names, n=1)
            hint = f"did you mean {near[0]}? T" if near else "t"
            raise ConfigurationError(f"{words[0]} is not a command; {hint}here are {', '.join(names)}")
    # By this name the command's usage lines call it.
    sys.argv = [f"{_MODULE} {command.name}", *words[1:]]
    command.run()


def overview() -> str:
    """A line for every command."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name.ljust(width)}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            f"usage: {_MODULE} COMMAND ...",
            "",
            *lines,
            "",
            f"Each explains itself ({_MODULE} train --help). Installed: spikingbrain-COMMAND.",
        ]
    )
