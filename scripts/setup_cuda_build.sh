#!/usr/bin/env bash
# Installs torch's CUDA build into a folder beside a virtual environment, or returns at once when it is there.
#
#   scripts/setup_cuda_build.sh [ENVIRONMENT]      .venv by default, which gets .venv-cuda (5 GB)
#
# No GPU is needed: tests/fake_gpu/driver.c, compiled into that folder, plays one that computes nothing.
# tests/fake_gpu/test_steps_on_cuda_build.py puts the folder in front of the environment's packages, in a process of its own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
folder=$venv-cuda
driver=$root/tests/fake_gpu/driver.c

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

[ -x "$venv/bin/python" ] || fail "there is no environment in $venv; make it with make environment"
command -v cc >/dev/null || fail "no C compiler (cc) compiles tests/fake_gpu/driver.c; install one, such as gcc"
torch=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch").partition("+")[0])')
fingerprint="$("$venv/bin/python" --version) torch $torch $(cat "$driver" "${BASH_SOURCE[0]}" | cksum)"
if [ -f "$folder/.installed" ] && [ "$(cat "$folder/.installed")" = "$fingerprint" ]; then
    exit 0
fi
printf "Installing torch's CUDA build into %s; it is 5 GB large and takes some minutes\n" "$folder"
unfinished=$folder.unfinished # a failed install must not look finished
rm -rf -- "$folder" "$unfinished"
# ===: a build for CPUs, which pip would take for the later one, is called $torch+cpu.
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile --target "$unfinished" "torch===$torch" ||
    fail "the installation into $folder failed (pip's message is above); the next call tries again"
[ -n "$(PYTHONPATH=$unfinished "$venv/bin/python" -c 'import torch; print(torch.version.cuda or "")')" ] ||
    fail "pip's index has torch $torch for CPUs alone; set PIP_INDEX_URL to one that has the CUDA build, such as PyPI"
cc -shared -fPIC -Wl,-soname,libcuda.so.1 -I "$unfinished/triton/backends/nvidia/include" \
    -o "$unfinished/libcuda.so.1" "$driver"
printf '%s\n' "$fingerprint" >"$unfinished/.installed"
mv -- "$unfinished" "$folder"
printf 'Ready: %s\n' "$folder"
