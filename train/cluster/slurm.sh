#!/bin/bash
# Trains on several machines with Slurm: sbatch train/cluster/slurm.sh train/train_vdm.py --config RECIPE
# One launcher runs on each machine; they meet at the first machine. If the job fails or its time is over, it is queued
# again and resumes from the newest checkpoint.
#SBATCH --job-name=vgen
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# five minutes before the time is over, the run saves a checkpoint and stops
#SBATCH --signal=TERM@300

set -euo pipefail
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds that the launchers wait for this checkpoint

# a machine that fails ends the launchers of all others
if ! srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${GPUS_PER_NODE:-8}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:29500" \
    --rdzv-id="$SLURM_JOB_ID" \
    "$@"; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-20}" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 1
fi
