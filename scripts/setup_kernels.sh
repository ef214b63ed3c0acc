#!/usr/bin/env bash
# Installs Triton into a folder beside a virtual environment, or returns at once when it is there.
#
#   scripts/setup_kernels.sh [ENVIRONMENT]      .venv by default, which gets .venv-kernels
#
# tests/ops/test_interpreted_kernels.py puts that folder in front of the environment's packages, in a process of its own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
folder=$venv-kernels

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

[ -x "$venv/bin/python" ] || fail "there is no environment in $venv; make it with make environment"
fingerprint="$("$venv/bin/python" --version) $(cat "$root/constraints/kernels.txt" "${BASH_SOURCE[0]}" | cksum)"
if [ -f "$folder/.installed" ] && [ "$(cat "$folder/.installed")" = "$fingerprint" ]; then
    exit 0
fi
printf 'Installing Triton into %s; this takes a minute the first time\n' "$folder"
unfinished=$folder.unfinished # a failed install must not look finished
rm -rf -- "$folder" "$unfinished"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --no-compile --target "$unfinished" \
    --requirement "$root/constraints/kernels.txt" ||
    fail "the installation into $folder failed (pip's message is above); the next call tries again"
printf '%s\n' "$fingerprint" >"$unfinished/.installed"
mv -- "$unfinished" "$folder"
printf 'Ready: %s\n' "$folder"
