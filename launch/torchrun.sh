#!/usr/bin/env bash
# Train a recipe on one machine or several through torchrun: the same line on each. What is lost is started again.
#
#   PROCESSES=2 launch/torchrun.sh cnn --out runs/cnn                        two CPU processes of this machine
#   HEAD=node1:29400 NODES=2 GPUS=8 launch/torchrun.sh lm --out /shared/lm   on each of two machines
#   HEAD=node1:29400 NODES=1:4 launch/torchrun.sh lm --out /shared/lm        goes on with 1 to 4, as they come and go
#
# NODES      machines: a number, or MIN:MAX (1)
# GPUS       processes of this machine, a GPU each; 0 for the CPU (all GPUs there are)
# PROCESSES  processes of this machine on the CPU (1)
# HEAD       HOST:PORT of the machine that all others meet at; it must outlive the run (this one)
# RESTARTS   how often processes that fail are started again (3)
# CONFIG     a file of accelerate_configs/: what it says of FSDP2 and precision (none: DDP)
# WAIT       seconds to wait for the other machines (600)
# GRACE      seconds that a process told to leave has to save (30)
# ID         the name of the run among those that meet at HEAD (the run folder)
# ADDRESS    this machine's address for the others (its host name)
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
exec python launch/torchrun.py "$@"
