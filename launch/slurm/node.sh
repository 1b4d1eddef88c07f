#!/bin/bash
# On every node, once: torchrun with this node's GPUs, and the signals that torchrun itself would not survive.
#
# Slurm signals this script alone. torchrun answers SIGTERM by killing its workers after 30 s and dies of SIGUSR1, so
# both go straight to the workers, its children, as SIGUSR1: they finish the step, save, and end with code 75.
set -u

torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${GPUS_PER_NODE:-8}" --max-restarts=0 \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-$ATTEMPT" --rdzv-endpoint="$RENDEZVOUS" \
  launch/midtrain.py "$@" &
agent=$!
trap 'pkill -USR1 -P "$agent"' USR1 TERM

# A trapped signal ends `wait` early: wait on until torchrun is gone.
while true; do
  wait "$agent"
  code=$?
  kill -0 "$agent" 2>/dev/null || exit "$code"
done
