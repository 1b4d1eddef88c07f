#!/bin/bash
# On every node, once: torchrun with this node's ranks, and the signals that torchrun itself would not survive.
#
# Slurm signals this script, or every process (it depends on ProctrackType). torchrun answers SIGTERM by killing its
# workers after 30 s and dies of SIGUSR1, and its workers with it. It therefore ignores SIGUSR1, and what reaches this
# script goes straight to the workers, its children, as SIGUSR1: they save and end with code 75.
set -u

program=$1
shift
(
  trap '' USR1
  # Each rank on the cores beside its GPU.
  [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || numa=--numa-binding=node
  exec torchrun ${numa:-} \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-$ATTEMPT" --rdzv-endpoint="$RENDEZVOUS" \
    "launch/$program.py" "$@"
) &
agent=$!
trap : USR1 TERM

# A trapped signal ends `wait` early: hand it on, once there are workers, and wait until torchrun is gone.
while true; do
  wait "$agent"
  code=$?
  until ! kill -0 "$agent" 2>/dev/null || pkill -USR1 -P "$agent"; do sleep 1; done
  kill -0 "$agent" 2>/dev/null || exit "$code"
done
