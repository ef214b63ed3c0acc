#!/usr/bin/env bash
# Creates the virtual environment that the Makefile's targets run in, or returns at once when it is up to date.
#
#   scripts/setup_environment.sh [FOLDER]      FOLDER defaults to .venv
#
# PYTHON chooses the interpreter (3.10 to 3.12); without it the first suitable one is taken.
# SYSTEM_TORCH=yes keeps the torch that this interpreter has already, as in the images of NVIDIA and MetaX: the environment
# sees all that is installed there, and only what is missing gets the tested versions.
# pip's own variables apply: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets torch without CUDA libraries.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
stamp=$venv/.installed

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# Prints "3.11" for an interpreter that starts and is supported. A pyenv shim of an inactive version fails here.
supported_version() {
    "$1" -c 'import sys
v = sys.version_info[:2]
print("%d.%d" % v) if (3, 10) <= v <= (3, 12) else sys.exit(1)' 2>/dev/null
}

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {
    local candidate without_venv=
    if [ -n "${PYTHON:-}" ]; then
        supported_version "$PYTHON" >/dev/null ||
            fail "PYTHON=$PYTHON is not a working Python 3.10, 3.11 or 3.12; set PYTHON to one that is"
        has_venv "$PYTHON" ||
            fail "PYTHON=$PYTHON has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.10 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[0-2].*/bin/python; do
        supported_version "$candidate" >/dev/null || continue
        if has_venv "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    [ -z "$without_venv" ] ||
        fail "$without_venv has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv) or set PYTHON"
    fail "no working Python 3.10, 3.11 or 3.12 found; install one or set PYTHON=/path/to/python"
}

# Prints the tested versions but for packages that the system's interpreter has, and the version of its torch.
versions_beside_the_systems() {
    "$1" -c 'import re, sys
from importlib.metadata import distributions

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

paths = [path for path in sys.path if path and not path.startswith(sys.prefix + "/")]
installed = {plain(found.metadata["Name"]): found.version for found in distributions(path=paths)}
if "torch" not in installed:
    sys.exit(1)
for line in open(sys.argv[1]):
    name = re.match(r"[\w.-]+", line)
    if name is None or plain(name[0]) not in installed:
        print(line, end="")
print("torch==" + installed["torch"])' "$2"
}

# The environment is current while its interpreter and everything that decides its contents are the same.
fingerprint() {
    printf 'python %s%s\n' "$1" "${system_torch:+, its own torch}"
    cat "$root/pyproject.toml" "$root/constraints/py${1/./}.txt" "${BASH_SOURCE[0]}" | cksum
}

system_torch=
options=(--clear)
case ${SYSTEM_TORCH:-no} in
no) ;;
yes) system_torch=yes options+=(--system-site-packages) ;;
*) fail "SYSTEM_TORCH=$SYSTEM_TORCH is neither yes nor no" ;;
esac

# An environment that sees its interpreter's packages cannot become one that doesn't, nor the other way round.
is_of_that_kind() {
    local sees=false
    [ -z "$system_torch" ] || sees=true
    [ -x "$venv/bin/python" ] && grep -qsx "include-system-site-packages = $sees" "$venv/pyvenv.cfg"
}

if [ -n "${PYTHON:-}" ] || ! is_of_that_kind; then
    python=$(find_python)
else
    python=$venv/bin/python
fi
if ! version=$(supported_version "$python"); then # an environment whose interpreter has since gone
    python=$(find_python)
    version=$(supported_version "$python")
fi
constraints=$root/constraints/py${version/./}.txt
[ -f "$constraints" ] || fail "there are no tested versions for Python $version ($constraints is missing)"

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint "$version")" ]; then
    exit 0
fi

rm -f "$stamp" # a failed install must not look finished
if ! is_of_that_kind || [ "$(supported_version "$venv/bin/python" || true)" != "$version" ]; then
    printf 'Creating %s with %s (Python %s)\n' "$venv" "$python" "$version"
    "$python" -m venv "${options[@]}" "$venv" || fail "could not create $venv with $python"
fi
printf 'Installing the versions of %s; this takes some minutes the first time\n' "${constraints#"$root"/}"
pip_install() {
    (cd "$root" && "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@") ||
        fail "the installation into $venv failed (pip's message is above); the next call tries again"
}
used=$constraints
if [ -n "$system_torch" ]; then
    used=$venv/constraints.txt
    versions_beside_the_systems "$venv/bin/python" "$constraints" >"$used" ||
        fail "SYSTEM_TORCH=yes, but $python has no torch; set PYTHON to the interpreter that has it, or unset SYSTEM_TORCH"
fi
pip_install 'pip>=23.1' # older ones cannot install this project in editable form
pip_install --constraint "$used" --editable '.[dev,demo,deepspeed,evaluation,gigatoken,docs,serve]'
fingerprint "$version" >"$stamp"
printf 'Ready: %s\n' "$venv"
