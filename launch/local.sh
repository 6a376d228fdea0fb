#!/usr/bin/env bash
# Train a recipe on this machine: one process as it is, several through accelerate launch.
#
#   launch/local.sh cnn --lr 1e-3            one process: the GPU where there is one, else the CPU
#   GPUS=8 launch/local.sh cnn               eight processes, a GPU each
#   CONFIG=cpu_2proc launch/local.sh cnn     what a file of accelerate_configs/ says
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
recipes() { grep -l __main__ recipes/*.py | sed 's/.*\///; s/\.py$//' | xargs; }
train() { exec accelerate launch --quiet --num_cpu_threads_per_process 1 "$@"; } # 1 is unsaid: the run chooses

recipe=${1:?usage: launch/local.sh RECIPE [options]; recipes: $(recipes)}
shift
file=recipes/${recipe%.py}.py
if [ ! -f "$file" ]; then
    echo "error: no recipe '$recipe'; there are: $(recipes)" >&2
    exit 2
fi

if [ -n "${CONFIG:-}" ]; then
    train --config_file "accelerate_configs/$CONFIG.yaml" ${GPUS:+--num_processes "$GPUS"} "$file" "$@"
elif [ "${GPUS:-1}" -gt 1 ]; then
    train --config_file accelerate_configs/ddp.yaml --num_processes "$GPUS" "$file" "$@"
fi
exec python "$file" "$@" # one process needs no launcher, which would hide how it ended
