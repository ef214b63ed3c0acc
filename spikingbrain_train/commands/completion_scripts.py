"""What makes bash, zsh and fish complete the commands of this project; the parser of the command for it."""

from __future__ import annotations

import argparse

from spikingbrain_train.config.command_line import called_as

_DESCRIPTION = """\
Print what makes a shell complete commands, groups, choices, settings, flags and files. To have it for good:

  bash   spikingbrain-completion bash > ~/.local/share/bash-completion/completions/spikingbrain
         echo '. ~/.local/share/bash-completion/completions/spikingbrain' >> ~/.bashrc
  zsh    echo 'source <(spikingbrain-completion zsh)' >> ~/.zshrc      (behind compinit)
  fish   spikingbrain-completion fish > ~/.config/fish/conf.d/spikingbrain.fish

For the shell that is open: source <(spikingbrain-completion bash).
"""

_BASH = r"""# Completion of the commands of spikingbrain-train for bash.
_spikingbrain() {
    local helper=spikingbrain-completion IFS=$'\n' current=${COMP_WORDS[COMP_CWORD]} found
    [[ ${COMP_WORDS[0]} == */* ]] && helper=${COMP_WORDS[0]%/*}/$helper
    local line=${COMP_LINE:0:COMP_POINT}
    mapfile -t found < <("$helper" suggest --breaks "$COMP_WORDBREAKS" "--line=$line" 2>/dev/null)
    COMPREPLY=("${found[@]:1}")
    if [[ ${found[0]} == +files ]]; then
        [[ $current == = ]] && current=
        mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$current")
        compopt -o filenames
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]]; then
        compopt -o nospace
    fi
}
complete -F _spikingbrain PROGRAMS
"""

_ZSH = r"""# Completion of the commands of spikingbrain-train for zsh.
_spikingbrain() {
    local helper=spikingbrain-completion
    [[ ${words[1]} == */* ]] && helper=${words[1]:h}/$helper
    local -a found open whole
    found=("${(@f)$("$helper" suggest "--line=$LBUFFER" 2>/dev/null)}")
    open=("${(@M)found[2,-1]:#*[=.]}")
    whole=("${(@)found[2,-1]:#*[=.]}")
    (( $#open )) && compadd -S '' -- "${open[@]}"
    (( $#whole )) && compadd -- "${whole[@]}"
    if [[ ${found[1]} == +files ]]; then
        compset -P '*='
        _files
    fi
}
compdef _spikingbrain PROGRAMS
"""

_FISH = r"""# Completion of the commands of spikingbrain-train for fish.
function __spikingbrain
    set -l found (spikingbrain-completion suggest "--line="(commandline -cp) 2>/dev/null)
    printf '%s\n' $found[2..-1]
    if test "$found[1]" = +files
        __fish_complete_path (commandline -ct)
    end
end
for program in PROGRAMS
    complete -c $program -f -a '(__spikingbrain)'
end
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion_parser() -> argparse.ArgumentParser:
    """The arguments of ``spikingbrain-completion``."""
    parser = argparse.ArgumentParser(
        prog=called_as(), description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shells = parser.add_subparsers(dest="shell", required=True, metavar="{" + ",".join(SCRIPTS) + "}")
    for shell in SCRIPTS:
        shells.add_parser(shell, help=f"print the script for {shell}")
    suggest = shells.add_parser("suggest")  # what the scripts call
    suggest.add_argument("--line", required=True)
    suggest.add_argument("--breaks", default="")
    return parser
