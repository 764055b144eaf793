#!/usr/bin/env bash
# llava15_7b_full_nodes.sh as a Slurm job that outlives its time limit: 5 minutes before it, Slurm sends SIGUSR1 to this shell, which
# hands it on; the run saves at the end of its step, is queued again, and goes on from there.
# Hardware: 2 nodes with 4 GPUs of 80 GB each, as asked for below; adapt the #SBATCH lines (partition, account, memory) to the cluster.
# Hours: not measured here; not run under Slurm, but with stand-ins for srun and scontrol.
# Expected: as llava15_7b_full.sh, over as many jobs as it takes.
# Usage, in the repository: sbatch scripts/train/slurm.sh MODEL SCORED_DATA OUTPUT [more flags]
#SBATCH --job-name=muffin
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000))
srun --kill-on-bad-exit=1 \
    scripts/train/llava15_7b_full_nodes.sh \
    "$SLURM_NNODES" "$SLURM_GPUS_PER_NODE" "$host:$port" "$model" "$data" "$output" \
    --resume_from_checkpoint last \
    "$@" &
run=$!
stopped=no
trap 'stopped=yes; kill -USR1 "$run"' USR1 # srun sends it on to every node

status=0
wait "$run" || status=$?
if [[ $stopped == yes ]]; then # the signal ended that wait, while the run was still saving
    status=0
    wait "$run" || status=$?
fi
if [[ $stopped == yes && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
