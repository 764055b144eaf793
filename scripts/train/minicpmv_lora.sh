#!/usr/bin/env bash
# LoRA of MiniCPM-V 4.6, MiniCPM-V 2.6 or MiniCPM-Llama3-V 2.5: optimizer values of OpenBMB's fine-tuning guide (finetune/finetune_lora.sh:
# learning rate 1e-6, weight decay 0.1, adam_beta2 0.95, warm-up 1 %), DPO values of RLAIF-V, about 4 epochs at 8 pairs a step.
# Hardware: 8 GPUs with 24 GB (4.6) or 40 GB (2.6, 2.5), unverified; fewer with --gradient_accumulation_steps.
# Hours: not run here; this script's values were never tried on the real checkpoints.
# Expected: "reference gate: ... loss - ln 2" near 0, first logged loss 0.6931 (ln 2).
# Usage: scripts/train/minicpmv_lora.sh MODEL SCORED_DATA OUTPUT [more flags]; the data comes from scripts/score_reference_minicpmv.sh.
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
torchrun --standalone --nproc_per_node 8 train/dpo.py \
    --model_name_or_path "$model" \
    --data_path "$data" \
    --output_dir "$output" \
    --dtype bfloat16 \
    --tf32 True \
    --model_max_length 2048 \
    --lora_enable True \
    --lora_r 64 \
    --lora_alpha 64 \
    --lora_dropout 0.05 \
    --dpo_beta 0.1 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --max_steps 2672 \
    --learning_rate 1e-6 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.01 \
    --weight_decay 0.1 \
    --adam_beta2 0.95 \
    --activation_checkpointing True \
    --dataloader_num_workers 4 \
    --save_strategy steps \
    --save_steps 167 \
    --save_total_limit 16 \
    --logging_steps 5 \
    --logging_first_step True \
    --report_to tensorboard \
    "$@"
