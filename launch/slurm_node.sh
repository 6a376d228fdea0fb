#!/usr/bin/env bash
# One node's part of a job: launch/slurm.sbatch has srun start it once on each node.
# Arguments: a file of accelerate_configs/, a recipe's file, the run's options.
set -uo pipefail
config=$1 file=$2
shift 2
PATH="$PWD/.venv/bin:$PATH"
refuse() {
    echo "error: $1" >&2
    exit 2
}

# Which node this is, only this shell knows: in the job's script, or on the node where it was submitted,
# $SLURM_NODEID is 0 or nothing, and a node that takes it from there takes itself for the first.
rank=${SLURM_NODEID:-}
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ! [[ $rank =~ ^[0-9]+$ ]] || [ "${names[rank]:-}" != "$SLURMD_NODENAME" ]; then
    refuse "$SLURMD_NODENAME was told that SLURM_NODEID is '$rank', so several nodes would be the first; it was read outside of srun or quoted: let srun start launch/slurm_node.sh itself"
fi
[ "${SLURM_STEP_NUM_TASKS:-}" = "${#names[@]}" ] || refuse "srun started ${SLURM_STEP_NUM_TASKS:-no} tasks on ${#names[@]} nodes; one launcher on each is wanted: srun --ntasks-per-node=1"

# Where they meet: on the first node, by SLURM's own address where its name means nothing to the resolver. The port
# is below those that systems hand out themselves, and another for each step (as in scaletrain/slurm.py).
address=${names[0]}
getent hosts "$address" > /dev/null || address=$(scontrol show node "$address" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
port=$((15000 + (101 * SLURM_JOB_ID + SLURM_STEP_ID % 101) % 15000))
count=$((${#names[@]} * PROCESSES))
options=(--config_file "$config" --num_machines "${#names[@]}" --num_processes "$count" --machine_rank "$rank")
options+=(--main_process_ip "$address" --main_process_port "$port" --rdzv_backend static)

# Where SLURM tracks processes by cgroups, it signals this shell alone, which passes it on; elsewhere, every process of
# the step (FORWARD is empty). This shell remembers a SIGTERM: a launcher that was still starting could not say why it
# ended. SIGUSR1, which means save, is for the recipe's processes: the launcher between would end by it.
told=""
trap 'told=yes; [ -z "${FORWARD:-}" ] || kill -TERM $!' TERM
trap '[ -z "${FORWARD:-}" ] || pkill -USR1 -P $!' USR1
(
    trap '' USR1
    exec accelerate launch --quiet --num_cpu_threads_per_process 1 "${options[@]}" "$file" "$@" # 1 is unsaid: the run chooses
) &
while :; do
    wait $!
    code=$?
    [ "$code" -gt 128 ] && kill -0 $! 2> /dev/null || break # a signal ended the waiting alone
done
[ "$code" -eq 0 ] || [ -z "$told" ] || exit 143
exit "$code"
