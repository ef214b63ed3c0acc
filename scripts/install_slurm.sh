#!/usr/bin/env bash
# Installs Slurm and munge for tests/slurm where that is possible, and says so where it is not: those tests skip then.
# None of their services is started: the tests run daemons of their own, from a folder and on ports of their own.
#
#   scripts/install_slurm.sh [file that keeps the packages from starting services: /usr/sbin/policy-rc.d]
set -uo pipefail
policy=${1:-/usr/sbin/policy-rc.d}
packages=(slurm-wlm munge)

skipped() {
    printf 'Slurm is not installed: %s; the tests of tests/slurm are going to be skipped\n' "$1"
    exit 0
}
# Debian keeps daemons where users do not look.
has_all() {
    local program
    for program in munged slurmctld slurmd sbatch srun; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || return 1
    done
}

if has_all; then
    printf 'Slurm is installed\n'
    exit 0
fi
command -v apt-get >/dev/null || skipped 'there is no apt-get here'
[ "$(id -u)" -eq 0 ] || skipped "apt-get needs root; as root: apt-get install ${packages[*]}"

said=$(mktemp)
made_policy=no
cleanup() {
    rm -f "$said"
    [ "$made_policy" = no ] || rm -f "$policy"
}
trap cleanup EXIT
if [ ! -e "$policy" ]; then
    made_policy=yes
    printf '#!/bin/sh\nexit 101\n' >"$policy" # "action not allowed", to invoke-rc.d
    chmod +x "$policy"
fi
# No mirror may hold up the tests: one that does not answer is given up.
apt() {
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 \
        -o Acquire::https::Timeout=20 -o DPkg::Lock::Timeout=60 "$@" >"$said" 2>&1 </dev/null
}
apt update || skipped "apt-get update failed ($(tail -n 1 "$said"))"
apt install -y --no-install-recommends "${packages[@]}" || skipped "apt-get install failed ($(tail -n 1 "$said"))"
has_all || skipped "the packages ${packages[*]} lack a daemon here"
printf 'Slurm is now installed\n'
