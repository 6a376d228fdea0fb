#!/usr/bin/env bash
# Train a recipe on a Kubernetes cluster: put the values into launch/kubernetes.yaml and hand it to kubectl.
#
#   IMAGE=registry/scaletrain:1 NODES=2 GPUS=8 launch/kubernetes.sh lm --max-steps 10000
#   DRY_RUN=1 IMAGE=... launch/kubernetes.sh lm          prints it and applies nothing
#
# IMAGE   an image of launch/Dockerfile            NODES   machines (1)         GPUS   of each machine; 0: CPU (1)
# NAME    of the job and of its run folder (RECIPE)        CLAIM  a volume claim that all can write (scaletrain-runs)
# CPUS, MEMORY, SHARED_MEMORY   of each machine (4, 16Gi, 8Gi)     RETRIES  failures that are forgiven (4 each machine)
# PROCESSES, CONFIG, RESTARTS, GRACE, WAIT         as in launch/torchrun.sh
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "error: $1" >&2; exit 2; }
check() { [[ ${!1} =~ ^($2)$ ]] || fail "$1=${!1}: expected $3"; }
recipes() { grep -l __main__ recipes/*.py | sed 's/.*\///; s/\.py$//' | xargs; }

RECIPE=${1:?usage: launch/kubernetes.sh RECIPE [options]; recipes: $(recipes)}
RECIPE=${RECIPE%.py}
shift
[ -f "recipes/$RECIPE.py" ] || fail "no recipe '$RECIPE'; there are: $(recipes)"
[ -n "${IMAGE:-}" ] || fail "IMAGE is not set: give the name of an image built from launch/Dockerfile"
for word in "$@"; do
    case $word in --out | --out=*) fail "--out is the cluster's: the run folder is /runs/NAME of the claim; give NAME" ;; esac
done
: "${NODES:=1}" "${GPUS:=1}" "${PROCESSES:=1}" "${CONFIG:=}" "${RESTARTS:=3}" "${GRACE:=120}" "${WAIT:=600}"
: "${NAME:=${RECIPE//_/-}}" "${CLAIM:=scaletrain-runs}" "${CPUS:=4}" "${MEMORY:=16Gi}" "${SHARED_MEMORY:=8Gi}"
: "${WANDB_MODE:=online}"
count='[1-9][0-9]{0,4}' quantity='[0-9]+(\.[0-9]+)?(m|[kMGT]i?)?'
check NODES "$count" "a number of machines (a job has no fewer at times: MIN:MAX is for launch/torchrun.sh)"
for name in GPUS RESTARTS; do check $name "0|$count" "a whole number"; done
for name in PROCESSES GRACE WAIT; do check $name "$count" "a whole number, 1 or more"; done
for name in CPUS MEMORY SHARED_MEMORY; do check $name "$quantity" "a quantity, as 4 or 16Gi"; done
for name in NAME CLAIM; do check $name '[a-z]([a-z0-9-]{0,50}[a-z0-9])?' "small letters, digits and -, at most 52"; done
check IMAGE '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "the name of an image"
check CONFIG '[a-z0-9_]*' "the name of a file in accelerate_configs/"
check WANDB_MODE '[a-z]+' "online, offline or disabled"
RETRIES=${RETRIES:-$((4 * NODES))} GRACE_AND_MORE=$((GRACE + 30))
check RETRIES "0|$count" "a whole number"
# JSON is YAML; \$( would be a variable to Kubernetes
ARGUMENTS=$(python3 -c 'import json, sys; print(json.dumps([w.replace("$(", "$$(") for w in sys.argv[1:]]))' "$RECIPE" "$@")

text=$(< launch/kubernetes.yaml)
for name in NODES GPUS PROCESSES CONFIG RESTARTS GRACE GRACE_AND_MORE WAIT NAME CLAIM CPUS MEMORY SHARED_MEMORY \
    WANDB_MODE IMAGE RETRIES ARGUMENTS; do
    text=${text//"\${$name}"/"${!name}"}
done
if [ "${DRY_RUN:-}" = 1 ]; then
    printf '%s\n' "$text"
else
    command -v kubectl > /dev/null || fail "kubectl is not installed; DRY_RUN=1 prints what it would be given"
    kubectl apply -f - <<< "$text"
fi
