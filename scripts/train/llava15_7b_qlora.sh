#!/usr/bin/env bash
# QLoRA of LLaVA-1.5-7B on one GPU: the hyper-parameters of llava15_7b_lora.sh, 8 pairs a step by accumulation.
# Hardware: one GPU with 24 GB, by arithmetic (nf4 weights 3.3 GB, vision tower, embeddings and lm_head in bfloat16 1.2 GB, adapter with
# gradients and 8-bit Adam 1.6 GB, the rest for activations); not run on one here.
# Hours: not measured here.
# Expected: "reference gate: ... loss - ln 2" near 0, first logged loss 0.6931 (ln 2), then falling; rewards/accuracies rising from 0.5.
# Usage: scripts/train/llava15_7b_qlora.sh MODEL SCORED_DATA OUTPUT [more flags]; the data comes from scripts/score_reference.sh with
# --bits 4.
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
python train/dpo.py \
    --model_name_or_path "$model" \
    --data_path "$data" \
    --output_dir "$output" \
    --dtype bfloat16 \
    --tf32 True \
    --prompt_name llava_v1 \
    --image_aspect_ratio pad \
    --model_max_length 2048 \
    --lora_enable True \
    --bits 4 \
    --optim paged_adamw_8bit \
    --lora_r 64 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --dpo_beta 0.1 \
    --dpo_use_average False \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
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
