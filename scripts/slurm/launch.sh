#!/usr/bin/env bash
# Runs train.py on every node of a Slurm allocation: one torchrun a node, meeting on the first one.
# nvidia.sbatch, metax.sbatch and cpu.sbatch end in this script; its arguments go to train.py as they are.
#
# Variables, all optional: those of environment.sh (CLUSTER_ENV, whose default the batch script says, PYTHON,
# CONTAINER_IMAGE, CONTAINER_MOUNTS, CONTAINER_ARGS), and
#   NPROC_PER_NODE    ranks per node                          (default: the GPUs that Slurm gave each node)
#   ENTRY             script to run                           (default: train.py)
#   MASTER_ADDR       host of the rendezvous                  (default: first node of the allocation)
#   MASTER_PORT       its port                                (default: from the job id, 15000-29999)
#   LOG_DIR           one log file per node goes there        (default: outputs/slurm/<job id>)
#   RANK_LOGS         yes: a log of every rank, too, in <LOG_DIR>/ranks/node<n>                 (default: no)
#   HEALTH_CHECK      no: start without looking at nodes, network and disk first  (default: yes, some seconds)
#   HEALTH_CHECK_ARGS further words for it, such as --min-bandwidth 40; spikingbrain-health-check --help
#   STOP_SECONDS      whole seconds that a run may take to save from the warning on  (default: 540)
#   MAX_REQUEUES      starts after which a job that loses a node is no longer requeued  (default: 10)
#   SWEEP_ARGUMENTS   folder of <task>.args, which holds the further arguments of an array task, one a line
#                     (spikingbrain-train --multirun --submit sets it)
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ -n "${SLURM_JOB_ID:-}" ] ||
    fail "no Slurm allocation; submit with \`sbatch scripts/slurm/nvidia.sbatch ...\` or metax.sbatch"
entry=${ENTRY:-train.py}
nodes=${SLURM_JOB_NUM_NODES:?Slurm sets it}
ranks=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
[ -n "$ranks" ] || fail "Slurm gave this job no GPUs; ask for them (sbatch --gpus-per-node=8) or set NPROC_PER_NODE"
whole_number NPROC_PER_NODE
whole_number MAX_REQUEUES
[ "$ranks" -gt 0 ] || fail "NPROC_PER_NODE=$ranks starts nothing; give the number of ranks on each node"
restarts=${SLURM_RESTART_COUNT:-0}
log_dir=${LOG_DIR:-$root/outputs/slurm/$SLURM_JOB_ID}

if [ -z "${MASTER_ADDR:-}" ]; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${hosts%%$'\n'*}
fi
# Jobs that share a node get different ports; the range lies below the ephemeral ports that clients are given.
MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}

# torch's CPU threads: each rank its share of the node's cores.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-$ranks}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores >= ranks ? cores / ranks : 1))}

# torchrun, which hands SIGTERM on, kills the ranks that have not ended this long after (torch 2.6: after 30 s, always).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-${STOP_SECONDS:-540}}

on_each_node=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cores")
run_options=(
    --kill-on-bad-exit=1 # one failed node ends the step instead of hanging the others
    --output="$log_dir/node%n.log" --open-mode=append # after a requeue the logs go on
)

arguments=("$@")
if [ -n "${SWEEP_ARGUMENTS:-}" ]; then
    task=$SWEEP_ARGUMENTS/${SLURM_ARRAY_TASK_ID:-0}.args
    [ -f "$task" ] || fail "$task is missing; submit the sweep again (spikingbrain-train --multirun --submit)"
    mapfile -t swept <"$task"
    arguments+=("${swept[@]}")
fi
if [ "$restarts" -gt 0 ]; then
    # A requeued job goes on from its newest checkpoint, whatever its first start was told. The last word wins.
    arguments+=(checkpoint.resume=auto)
fi
torchrun=("$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$ranks"
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$entry" "${arguments[@]}")

check=("$python" -m spikingbrain_train health-check)
read -r -a check_args <<<"${HEALTH_CHECK_ARGS:-}"
check+=("${check_args[@]}")
# Of another script's arguments nobody knows what they ask for.
[ "$entry" != train.py ] || check+=("${arguments[@]}")

case ${HEALTH_CHECK:-yes} in
yes | no) ;;
*) fail "HEALTH_CHECK=$HEALTH_CHECK is neither yes nor no" ;;
esac
case ${RANK_LOGS:-no} in
no) ;;
yes) export RANK_LOG_DIR=$log_dir/ranks ;;
*) fail "RANK_LOGS=$RANK_LOGS is neither yes nor no" ;;
esac

# Where torch's flight recorder writes, if it does: a node's /tmp, its own choice, may be gone with the job.
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$log_dir/nccl_trace_rank_}

cd "$root"
mkdir -p "$log_dir" || fail "$log_dir cannot be created; set LOG_DIR to a folder that every node can write"
printf 'job %s, start %d: %d nodes x %d ranks, rendezvous %s:%s\nlogs: %s/node*.log\nrun: %s\n' \
    "$SLURM_JOB_ID" "$((restarts + 1))" "$nodes" "$ranks" "$MASTER_ADDR" "$MASTER_PORT" "$log_dir" "${torchrun[*]@Q}"

# Slurm sends SIGUSR1 to this script ahead of the time limit (#SBATCH --signal). It is handed to srun, and so to every
# rank: they finish the step, save, and end with exit code 75, which torchrun turns into 1. The job goes back into
# the queue then, or after STOP_SECONDS, whatever comes first: requeueing ends what still runs.
# A preemption is announced like this only where slurm.conf has PreemptParameters=send_user_signal, and then by the
# partition's GraceTime, not by --signal's seconds. Elsewhere the ranks get SIGTERM, upon which they save all the same.
# Slurm requeues a preempted job only where it still runs when the GraceTime ends: one that has saved by then would
# count as failed, so it is requeued from here. So is one that has lost a node or a task of srun's, up to MAX_REQUEUES.
step=
timer=
interrupted=no
warned=no
requeued=no
# shellcheck disable=SC2317  # called by the traps
warn() {
    interrupted=yes
    [ "$warned" = no ] || return 0
    warned=yes
    printf 'job %s: stopping soon; the run saves, then the job is requeued\n' "$SLURM_JOB_ID"
    [ -z "$step" ] || kill -USR1 "$step" || true
    {
        sleep "${STOP_SECONDS:-540}" &
        nap=$!
        trap 'kill "$nap"; exit' TERM
        wait "$nap" && kill -USR2 $$
    } >/dev/null 2>&1 &
    timer=$!
}
# shellcheck disable=SC2317
overdue() {
    interrupted=yes
    printf 'job %s: the run has not saved in time\n' "$SLURM_JOB_ID" >&2
    requeue
}
requeue() {
    printf 'job %s: requeueing; it will continue from its newest checkpoint\n' "$SLURM_JOB_ID"
    if scontrol requeue "$SLURM_JOB_ID"; then
        requeued=yes
    else
        printf 'job %s could not be requeued; submit it again to continue\n' "$SLURM_JOB_ID" >&2
    fi
}
# Prints why the run ended if that was not its own doing.
loss() {
    case " $(scontrol show job "$SLURM_JOB_ID" --oneliner 2>/dev/null) " in
    *" JobState=CANCELLED "*) return ;;
    *" PreemptTime=None "*) ;;
    *" PreemptTime="*) printf 'it was preempted' && return ;;
    esac
    [ "$restarts" -lt "${MAX_REQUEUES:-10}" ] || return 0
    # States end in * where a node does not answer.
    if sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --format=%T 2>/dev/null | grep -q -e '\*$' -e '^down'; then
        printf 'a node is down'
    elif [ "$1" -eq 137 ]; then # SIGKILL, which torchrun does not get where a rank fails
        printf 'the processes of a node were killed'
    fi
}
trap warn USR1
trap overdue USR2

# Runs on every node. torchrun takes its options from PET_* variables too; the node's rank is the one that is known
# only on the node. torchrun would die of SIGUSR1, so it is started with the signal ignored; the ranks, which it
# starts, take it up again. Whether Slurm hands a signal to all processes of a step or to its first one only is up to
# the site: this first one passes it on to those below it. SIGTERM, which all get, it leaves to torchrun.
# shellcheck disable=SC2016
on_node='
export PET_NODE_RANK=$SLURM_NODEID
[ -z "${RANK_LOG_DIR:-}" ] || export PET_TEE=3 PET_LOG_DIR=$RANK_LOG_DIR/node$SLURM_NODEID
tell() {
    local child
    for child in $(cat "/proc/$1/task"/*/children 2>/dev/null); do
        kill -USR1 "$child" 2>/dev/null
        tell "$child"
    done
}
trap "interrupted=yes; tell $$" USR1
trap "interrupted=yes" TERM INT
(trap "" USR1; exec "$@") &
run=$!
while :; do
    interrupted=no
    wait "$run"
    status=$?
    [ "$interrupted" = yes ] || exit "$status"
done'

# Sets `status` to the exit code of a call of srun.
follow() {
    "$@" &
    step=$!
    [ "$warned" = no ] || kill -USR1 "$step" || true
    while :; do # a trapped signal ends `wait`, not the step
        interrupted=no
        status=0
        wait "$step" || status=$?
        [ "$interrupted" = yes ] || break
    done
}

status=0
what=
if [ "${HEALTH_CHECK:-yes}" = yes ]; then
    # Its ranks start without torchrun, which would wait for a missing node on its own terms. Whoever ends first ends
    # nobody else, whatever the site's KillOnBadExit is, so that rank 0 can say what it misses. What it prints stands
    # in the job's log.
    # shellcheck disable=SC2016
    on_node_check='
trap "" USR1 # a warning ends nothing here: what is found is said all the same, and no run is started behind it
ranks=$1
shift
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * ranks)) LOCAL_WORLD_SIZE=$ranks
started=()
for ((rank = 0; rank < ranks; rank++)); do
    RANK=$((SLURM_NODEID * ranks + rank)) LOCAL_RANK=$rank "$@" &
    started+=($!)
done
worst=0
for each in "${started[@]}"; do wait "$each" || worst=$?; done
exit "$worst"'
    export MASTER_ADDR MASTER_PORT
    follow srun "${on_each_node[@]}" --kill-on-bad-exit=0 "${container[@]}" \
        bash -c "$on_node_check" on_node_check "$ranks" "${inside[@]}" "${check[@]}"
    [ "$status" -eq 0 ] || what=' its health check, and no run was started'
    [ "$warned" = no ] || status=75 # no time is left for the run
fi
if [ "$status" -eq 0 ]; then
    follow srun "${on_each_node[@]}" "${run_options[@]}" "${container[@]}" \
        bash -c "$on_node" on_node "${inside[@]}" "${torchrun[@]}"
fi
[ -z "$timer" ] || kill "$timer" 2>/dev/null || true
# A health check that fails is no reason by itself to start again: the next start might meet the same node.
if [ "$requeued" = no ] && [ "$status" -ne 0 ]; then
    reason=
    [ "$warned" = yes ] || reason=$(loss "$status")
    [ -z "$reason" ] || printf 'job %s: %s\n' "$SLURM_JOB_ID" "$reason"
    if [ "$warned" = yes ] || [ -n "$reason" ]; then requeue; fi
fi
[ "$requeued" = no ] || exit 0
if [ -n "$what" ]; then
    printf 'job %s failed%s\n' "$SLURM_JOB_ID" "$what" >&2
elif [ "$status" -ne 0 ]; then
    printf 'job %s failed with exit code %d; see %s/node*.log\n' "$SLURM_JOB_ID" "$status" "$log_dir" >&2
fi
exit "$status"
