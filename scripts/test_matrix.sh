#!/usr/bin/env bash
# Runs the test suite with every supported Python that this machine has, each in an environment of its own:
#
#   3.10  torch 2.6   megatron-core 0.16.1   (what MetaX images carry)
#   3.11  torch 2.13  megatron-core 0.16.1
#   3.12  torch 2.13  megatron-core 0.19.2
#
# The exact versions are in constraints/. Environments lie in .venv-py310 and so on and are reused.
#
#   scripts/test_matrix.sh [VERSION...]     e.g. `scripts/test_matrix.sh 3.10`; without arguments all three
#
# PYTEST_ARGS is handed to pytest. Exit code: 0 all passed, 1 a suite failed, 2 a version could not be run.
# Without arguments, versions that the machine lacks are skipped, but one at least must be there.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
known=(3.10 3.11 3.12)

# Path of a working interpreter of exactly this version: from PATH, else from pyenv.
find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

wanted=("$@")
[ $# -gt 0 ] || wanted=("${known[@]}")
for version in "${wanted[@]}"; do
    case " ${known[*]} " in
    *" $version "*) ;;
    *)
        printf 'error: Python %s is not supported; choose from %s\n' "$version" "${known[*]}" >&2
        exit 2
        ;;
    esac
done

status=0 ran=0 summary=()
for version in "${wanted[@]}"; do
    if ! python=$(find_python "$version"); then
        if [ $# -gt 0 ]; then
            printf 'error: no working Python %s on PATH or in pyenv\n' "$version" >&2
            status=2
        fi
        summary+=("$version  skipped: no interpreter")
        continue
    fi
    venv=$root/.venv-py${version/./}
    printf '== Python %s\n' "$version"
    if ! PYTHON=$python "$root/scripts/setup_environment.sh" "$venv"; then
        status=2
        summary+=("$version  FAILED: its environment could not be made")
        continue
    fi
    ran=$((ran + 1)) begin=$SECONDS rc=0
    # shellcheck disable=SC2086  # PYTEST_ARGS is a list of words
    (cd "$root" && OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/bin/python" -m pytest -n auto ${PYTEST_ARGS:-}) || rc=$?
    if [ "$rc" -eq 0 ]; then
        summary+=("$version  passed after $((SECONDS - begin)) s")
    else
        summary+=("$version  FAILED (pytest exit $rc) after $((SECONDS - begin)) s")
        [ "$status" -ne 0 ] || status=1
    fi
done

printf '== summary\n'
printf '   Python %s\n' "${summary[@]}"
if [ "$ran" -eq 0 ] && [ "$status" -eq 0 ]; then
    printf 'error: none of Python %s works here; install one\n' "${known[*]}" >&2
    status=2
fi
exit "$status"
