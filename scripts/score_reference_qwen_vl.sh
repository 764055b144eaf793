#!/usr/bin/env bash
# Reference log-probs of RLAIF-V (83,132 rows) under Qwen2.5-VL or Qwen3-VL, for LoRA training in bfloat16.
# Hardware: one or more GPUs; bfloat16 weights take 17 GB (7B). An image of 640 x 480 is about 390 tokens.
# Hours: not run here; this script's values were never tried on the real checkpoints.
# Expected: a first DPO loss of 0.6931 (ln 2) when training on the output with the command that this one prints at its end.
# Usage: scripts/score_reference_qwen_vl.sh Qwen/Qwen2.5-VL-7B-Instruct DATA OUTPUT [more flags]
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
torchrun --standalone --nproc_per_node gpu eval/muffin_inference_logp.py \
    --model_name_or_path "$model" \
    --data_path "$data" \
    --output_dir "$output" \
    --dtype bfloat16 \
    --lora_enable True \
    --model_max_length 2048 \
    --batch_tokens 8192 \
    --shard_rows 1000 \
    "$@"
