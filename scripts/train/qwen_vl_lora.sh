#!/usr/bin/env bash
# LoRA of Qwen2.5-VL-7B or Qwen3-VL: schedule of the Qwen-VL fine-tuning guide (cosine, warm-up 3 %, no weight decay), learning rate and DPO
# values of RLAIF-V's LoRA script, about 4 epochs at 8 pairs a step.
# Hardware: 8 GPUs with 40 GB, unverified; fewer with --gradient_accumulation_steps.
# Hours: not run here; this script's values were never tried on the real checkpoints.
# Expected: "reference gate: ... loss - ln 2" near 0, first logged loss 0.6931 (ln 2).
# Usage: scripts/train/qwen_vl_lora.sh MODEL SCORED_DATA OUTPUT [more flags]; the data comes from scripts/score_reference_qwen_vl.sh.
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
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --dpo_beta 0.1 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --max_steps 2672 \
    --learning_rate 1e-5 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
    --weight_decay 0.0 \
    --activation_checkpointing True \
    --dataloader_num_workers 4 \
    --save_strategy steps \
    --save_steps 167 \
    --save_total_limit 16 \
    --logging_steps 5 \
    --logging_first_step True \
    --report_to tensorboard \
    "$@"
