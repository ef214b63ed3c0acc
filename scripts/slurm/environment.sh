#!/usr/bin/env bash
# What a job of this folder runs in: the variables of its cluster, and its container. launch.sh and step.sbatch source
# it. It sets
#   root        the checkout
#   inside      words before a command that runs in a container of apptainer; none without one
#   container   options of srun that make its tasks run in a container of pyxis; none without one
#   python      the interpreter of the project there
# of the variables, all optional,
#   CLUSTER_ENV       nvidia, metax or cpu: variables of such a cluster, from env/<name>.env; or the path of a
#                     file of your own, which is sourced
#   PYTHON            interpreter                             (default: .venv/bin/python, in a container python)
#   CONTAINER_IMAGE   a .sif file runs under apptainer; anything else is given to srun's pyxis plugin
#   CONTAINER_MOUNTS  source:target[,source:target...]        (default: this checkout, at its own path)
#   CONTAINER_ARGS    further words for `apptainer exec` or `srun`, such as --nv

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# Refuses a variable that is set to something else than a whole number.
whole_number() {
    case ${!1:-0} in
    *[!0-9]*) fail "$1=${!1} is no whole number; correct or unset it" ;;
    esac
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -n "${CLUSTER_ENV:-}" ]; then
    case $CLUSTER_ENV in
    */*) variables=$CLUSTER_ENV ;;
    *) variables=$root/scripts/slurm/env/$CLUSTER_ENV.env ;;
    esac
    known=$(cd "$root/scripts/slurm/env" && printf '%s, ' ./*.env)
    known=${known//.\//}
    [ -f "$variables" ] ||
        fail "CLUSTER_ENV=$CLUSTER_ENV names no variables; there are ${known//.env/}or the path of a file (./my.env)"
    # shellcheck source=/dev/null
    . "$variables"
fi

inside=()
container=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
    mounts=${CONTAINER_MOUNTS:-$root:$root}
    read -r -a container_args <<<"${CONTAINER_ARGS:-}"
    case $CONTAINER_IMAGE in
    *.sif) inside=(apptainer exec --pwd "$root" --bind "$mounts" "${container_args[@]}" "$CONTAINER_IMAGE") ;;
    *) container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$root"
        "${container_args[@]}") ;;
    esac
    python=${PYTHON:-python}
elif [ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ]; then
    python=${PYTHON:-python}
else
    python=$root/.venv/bin/python
fi
