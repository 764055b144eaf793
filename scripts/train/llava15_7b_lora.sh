#!/usr/bin/env bash
# LoRA of LLaVA-1.5-7B with RLAIF-V's published hyper-parameters: 2,672 steps of 8 pairs (4 epochs of one of its iterations).
# Hardware: 8 GPUs with 24 GB or more (bfloat16 base 14 GB, adapter with Adam 2.6 GB); fewer with --gradient_accumulation_steps.
# Hours: not measured here.
# Expected: "reference gate: ... loss - ln 2" near 0, first logged loss 0.6931 (ln 2), then falling; rewards/accuracies rising from 0.5.
# Usage: scripts/train/llava15_7b_lora.sh MODEL SCORED_DATA OUTPUT [more flags]; the data comes from scripts/score_reference.sh with
# --lora_enable True.
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
    --lora_enable True \
    --lora_r 64 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --dpo_beta 0.1 \
    --dpo_use_average False \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --max_steps 2672 \
    --learning_rate 1e-5 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.05 \
    --weight_decay 0.01 \
    --activation_checkpointing True \
    --dataloader_num_workers 4 \
    --save_strategy steps \
    --save_steps 167 \
    --save_total_limit 16 \
    --logging_steps 5 \
    --logging_first_step True \
    --report_to tensorboard \
    "$@"
