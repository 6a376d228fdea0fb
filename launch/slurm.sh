#!/usr/bin/env bash
# Hand a recipe to SLURM: a job that is asked to leave before its time is up, saves, and queues itself again.
#
#   NODES=2 GPUS=8 launch/slurm.sh lm --lr 1e-3      two nodes, eight processes each, a GPU per process
#   GPUS=0 PROCESSES=4 launch/slurm.sh mlp           one node, four processes on its CPUs
#
# Further variables:
#   CONFIG=fsdp2       a file of accelerate_configs/ (default ddp)
#   CPUS=16            cores of each node (default: the whole node)
#   GRACE=120          seconds between SIGTERM and the end of the time limit
#   SBATCH="--time=8:00:00 --partition=gpu"          any options of sbatch; its own variables, as SBATCH_ACCOUNT, count too
set -euo pipefail
cd "$(dirname "$0")/.."
recipes() { grep -l __main__ recipes/*.py | sed 's/.*\///; s/\.py$//' | xargs; }
refuse() {
    echo "error: $1" >&2
    exit 2
}
is_number() { [[ $1 =~ ^[0-9]+$ ]]; }

recipe=${1:?usage: NODES=2 GPUS=8 launch/slurm.sh RECIPE [options]; recipes: $(recipes)}
shift
file=recipes/${recipe%.py}.py
if [ -f "$recipe" ]; then file=$recipe; fi
[ -f "$file" ] || refuse "no recipe '$recipe'; there are: $(recipes)"

[ -n "${GPUS:-}" ] || refuse "GPUS is not given; say how many each node has, or GPUS=0 PROCESSES=4 for its CPUs"
NODES=${NODES:-1} PROCESSES=${PROCESSES:-$GPUS} GRACE=${GRACE:-120}
for name in NODES GPUS PROCESSES GRACE ${CPUS:+CPUS}; do
    is_number "${!name}" || refuse "$name=${!name} is not a number"
done
[ "$PROCESSES" -gt 0 ] || refuse "GPUS=0 needs PROCESSES, the number of processes on each node"
[ "$GPUS" -eq 0 ] || [ "$PROCESSES" -eq "$GPUS" ] || refuse "PROCESSES=$PROCESSES with GPUS=$GPUS: each GPU serves one process; leave PROCESSES out"
[ "$NODES" -gt 0 ] || refuse "NODES=0; a job needs one at least"

CONFIG=${CONFIG:-ddp}
config=accelerate_configs/$CONFIG.yaml
[ -f "$config" ] || refuse "no config '$CONFIG'; there are: $(basename -s .yaml accelerate_configs/*.yaml | xargs)"
! grep -q 'distributed_type: "NO"' "$config" || refuse "CONFIG=$CONFIG is for a single process; use ddp or fsdp2"
if [ "$GPUS" -eq 0 ] && [ "$CONFIG" = ddp ]; then config=accelerate_configs/cpu_2proc.yaml; fi
command -v sbatch > /dev/null || refuse "no sbatch here; run this where SLURM's commands are"

name=$(basename "$file" .py)
folder=runs/$name
mkdir -p "$folder"
export NODES GPUS PROCESSES GRACE
options=(--job-name="$name" --nodes="$NODES" --ntasks-per-node=1 --signal="B:USR1@$GRACE" --chdir="$PWD")
options+=(--requeue --open-mode=append --output="$folder/slurm-%j.log")
if [ "$GPUS" -gt 0 ]; then options+=(--gpus-per-node="$GPUS"); fi
if [ -n "${CPUS:-}" ]; then options+=(--cpus-per-task="$CPUS"); else options+=(--exclusive --mem=0); fi
# shellcheck disable=SC2086  # SBATCH holds several words
job=$(sbatch --parsable "${options[@]}" ${SBATCH:-} launch/slurm.sbatch "$config" "$file" "$@")
job=${job%%;*}
echo "job $job; its words go to $folder/slurm-$job.log"
