#!/usr/bin/env bash
# Reference log-probs of RLAIF-V (83,132 rows) under MiniCPM-V 4.6, MiniCPM-V 2.6 or MiniCPM-Llama3-V 2.5, for LoRA training in bfloat16.
# Hardware: one or more GPUs; bfloat16 weights take 3 GB (4.6), 17 GB (2.6, 2.5). Images are cut into up to 9 slices, which sets the speed.
# Hours: not run here; this script's values were never tried on the real checkpoints.
# Expected: a first DPO loss of 0.6931 (ln 2) when training on the output with the command that this one prints at its end.
# Usage: scripts/score_reference_minicpmv.sh openbmb/MiniCPM-V-4.6 DATA OUTPUT [more flags]
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
