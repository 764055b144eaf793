#!/usr/bin/env bash
# Reference log-probs of RLAIF-V (83,132 rows) under LLaVA-1.5-7B for full fine-tuning in bfloat16; for LoRA add --lora_enable True.
# Hardware: one or more GPUs of 40 GB (float32 weights take 28 GB); for LoRA training, 24 GB (bfloat16 weights take 14 GB).
# Hours: not measured here. Any number of GPUs gives the same files; run it again after a kill, it goes on at the next missing shard.
# Expected: a first DPO loss of 0.6931 (ln 2) when training on the output with the command that this one prints at its end.
# Usage: scripts/score_reference.sh MODEL DATA OUTPUT [more flags]
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
torchrun --standalone --nproc_per_node gpu eval/muffin_inference_logp.py \
    --model_name_or_path "$model" \
    --data_path "$data" \
    --output_dir "$output" \
    --dtype bfloat16 \
    --prompt_name llava_v1 \
    --image_aspect_ratio pad \
    --model_max_length 2048 \
    --batch_tokens 8192 \
    --shard_rows 1000 \
    "$@"
