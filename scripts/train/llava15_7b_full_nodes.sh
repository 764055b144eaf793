#!/usr/bin/env bash
# Full fine-tuning of LLaVA-1.5-7B on several nodes, ZeRO-3, with RLAIF-V's hyper-parameters: 2,672 steps of 8 pairs, here on 2 nodes of 4 GPUs.
# Hardware: 8 GPUs with 48 GB in all (ZeRO-3: float32 weights, gradients and Adam's states, 108 GB, shared by all; activations on top).
# More GPUs per node or more nodes: keep GPUs x --gradient_accumulation_steps at 8, or raise the batch on purpose.
# Hours: not measured here; never run on several nodes. The output folder has to be on a file system that all nodes share.
# Expected: as in llava15_7b_full.sh.
# Usage, the same on every node, at about the same time:
#   NODES=2 GPUS=4 MASTER=node0:29500 scripts/train/llava15_7b_full_nodes.sh MODEL SCORED_DATA OUTPUT [more flags]
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" --rdzv_backend c10d --rdzv_endpoint "$MASTER" --rdzv_id muffin --max_restarts 0 \
    train/dpo.py \
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
    --save_total_limit 16 \
    --logging_steps 5 \
    --report_to tensorboard \
    "$@"
