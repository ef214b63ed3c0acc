#!/usr/bin/env bash
# Builds llama-cpp-python from its source package into a folder beside a virtual environment, or returns at once when it
# is there. Of several calls at a time one builds, and the others wait for it.
#
#   scripts/setup_llama_cpp.sh [ENVIRONMENT]      .venv by default, which gets .venv-llama-cpp
#
# For tests/conversion/test_gguf.py: the smallest build that computes what llama.cpp computes. Compilers optimise the
# products of ggml's C alone, and what the tests do not call is left out. To use llama.cpp install '.[llama-cpp]' instead.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
folder=$venv-llama-cpp

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

[ -x "$venv/bin/python" ] || fail "there is no environment in $venv; make it with make environment"
version=$("$venv/bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
constraints=$root/constraints/py$version.txt
[ -f "$constraints" ] || fail "there are no tested versions for this Python ($constraints is missing)"
mapfile -t pinned < <(grep -E '^(diskcache|llama_cpp_python)==' "$constraints")
[ "${#pinned[@]}" -eq 2 ] || fail "$constraints does not name the versions of llama_cpp_python and diskcache"
fingerprint="${pinned[*]} $(cksum <"${BASH_SOURCE[0]}")"
is_there() { [ -f "$folder/.installed" ] && [ "$(cat "$folder/.installed")" = "$fingerprint" ]; }

! is_there || exit 0
exec 9<"$venv"
flock 9 || fail "$venv cannot be locked"
! is_there || exit 0 # another call has built it meanwhile
{ command -v "${CC:-cc}" && command -v "${CXX:-c++}"; } >/dev/null ||
    fail "there is no compiler for C and C++; install one (Debian, Ubuntu: apt-get install g++) or set CC and CXX"
printf 'Building llama.cpp into %s; this takes some minutes the first time\n' "$folder"
unfinished=$folder.unfinished # a failed build must not look finished
rm -rf -- "$folder" "$unfinished"
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
# The package switches this on by force: chat templates and command lines, most of the time of compilers.
printf 'set(LLAMA_BUILD_COMMON OFF)\n' >"$scratch/without_common.cmake"
cmake_args=(
    -DCMAKE_C_FLAGS_RELEASE="'-O1 -DNDEBUG'" -DCMAKE_CXX_FLAGS_RELEASE="'-O0 -DNDEBUG'"
    -DCMAKE_PROJECT_llama_cpp_INCLUDE="'$scratch/without_common.cmake'"
    -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF
    -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_REPACK=OFF
)
# Without pip's cache, which would give this build to whoever installs the package next.
CMAKE_ARGS="${cmake_args[*]}" "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-cache-dir \
    --no-deps --no-compile --no-binary llama-cpp-python --target "$unfinished" "${pinned[@]}" 9>&- ||
    fail "the build into $folder failed (pip's message is above); the next call tries again"
printf '%s\n' "$fingerprint" >"$unfinished/.installed"
mv -- "$unfinished" "$folder"
printf 'Ready: %s\n' "$folder"
