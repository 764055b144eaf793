#!/usr/bin/env bash
# Full fine-tuning of LLaVA-1.5-7B with RLAIF-V's published hyper-parameters: 2,672 steps of 8 pairs (4 epochs of one of its iterations).
# Hardware: 8 GPUs with 80 GB (ZeRO-2: float32 weights 27 GB each, gradients and Adam's 81 GB shared).
# Hours: not measured here.
# Expected: "reference gate: ... loss - ln 2" near 0, first logged loss 0.6931 (ln 2), then falling; rewards/accuracies rising from 0.5.
# Usage: scripts/train/llava15_7b_full.sh MODEL SCORED_DATA OUTPUT [more flags]; the data comes from scripts/score_reference.sh.
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
torchrun --standalone --nproc_per_node 8 train/dpo.py \
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
    --dpo_use_average False \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --max_steps 2672 \
    --learning_rate 5e-7 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.05 \
    --weight_decay 0.01 \
    --activation_checkpointing True \
    --deepspeed scripts/train/zero2.json \
    --dataloader_num_workers 4 \
    --save_strategy steps \
    --save_steps 167 \
    --save_total_limit 16 \
    --logging_steps 5 \
    --logging_first_step True \
    --report_to tensorboard \
    "$@"
