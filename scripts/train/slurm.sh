#!/usr/bin/env bash
# Full fine-tuning of LLaVA-1.5-7B under Slurm, as llava15_7b_full_nodes.sh, outliving the job's time limit: five minutes before the end Slurm
# sends SIGUSR1, training saves at the end of its step, the job goes back into the queue and on from its last checkpoint.
# One process per GPU is started by srun itself: torchrun would give its processes 30 seconds to save.
# Hardware: edit the #SBATCH lines; 8 GPUs with 48 GB in all. Hours: not measured here, never run on a real cluster.
# Expected: one loss curve over all restarts, starting at 0.6931 (ln 2).
# Usage: sbatch scripts/train/slurm.sh MODEL SCORED_DATA OUTPUT [more flags], from the repository's folder
#SBATCH --job-name=muffin
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # reads all: a closed pipe would end this script
export MASTER_ADDR MASTER_PORT=29500 WORLD_SIZE=$SLURM_NTASKS

# exec: the process that gets the signal below is srun itself.
train() {
    # shellcheck disable=SC2016  # each task expands its own rank
    exec srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' task python train/dpo.py \
        --model_name_or_path "$model" \
        --data_path "$data" \
        --output_dir "$output" \
        --dtype bfloat16 \
        --tf32 True \
        --prompt_name llava_v1 \
        --image_aspect_ratio pad \
        --model_max_length 2048 \
        --freeze_vision_tower True \
        --dpo_beta 0.1 \
        --per_device_train_batch_size 1 \
        --gradient_accumulation_steps 1 \
        --max_steps 2672 \
        --learning_rate 5e-7 \
        --lr_scheduler_type cosine \
        --warmup_steps 0.05 \
        --weight_decay 0.01 \
        --activation_checkpointing True \
        --deepspeed scripts/train/zero3.json \
        --dataloader_num_workers 4 \
        --save_strategy steps \
        --save_steps 167 \
        --save_total_limit 2 \
        --logging_steps 5 \
        --report_to tensorboard \
        --resume_from_checkpoint last \
        "$@"
}

# The signal comes to this shell; srun hands it on to all tasks, which save, exit with 138, and are waited for.
requeue() {
    kill -USR1 "$running"
    wait "$running" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1
train "$@" &
running=$!
wait "$running"
