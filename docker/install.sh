#!/usr/bin/env bash
# Steps of the images of this folder. tests/docker runs those of cpu.Dockerfile.
#
#   docker/install.sh system PACKAGE...      packages of Debian or Ubuntu; neither lists nor recommendations stay
#   docker/install.sh user NUMBER FOLDER...  a user of that number, who owns the folders
#   docker/install.sh kernels PACKAGE...     GPU kernels into the environment in $VENV, built against its torch
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq --yes --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/*
}

user() {
    local number=$1
    shift
    # Ubuntu's images have a user 1000 already.
    getent passwd "$number" >/dev/null || useradd --uid "$number" --create-home --shell /bin/bash trainer
    mkdir -p -- "$@"
    chown -- "$number:$(getent passwd "$number" | cut -d: -f4)" "$@"
}

kernels() {
    [ -f "$VENV/constraints.txt" ] || fail "there is no environment in VENV=$VENV; scripts/setup_environment.sh makes it"
    [ "$#" -eq 0 ] || "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-build-isolation \
        --constraint "$VENV/constraints.txt" "$@"
}

case ${1:-} in
system | user | kernels) "$@" ;;
*) fail "docker/install.sh ${1:-}: there is no such step; give system, user or kernels" ;;
esac
