#!/usr/bin/env bash
# RLAIF-V's iterations on own images and questions: LLaVA-1.5-7B judged by a stronger open model, four rounds of full fine-tuning, the
# paper's settings (10 answers at T 0.7, 2 pairs per prompt, 4 epochs, a checkpoint per quarter epoch; arXiv:2405.17220).
# Hardware: 8 GPUs with 80 GB (ZeRO-2). Hours: not measured here. Killed: run it again.
# Disk: 16 checkpoints per round, each 81 GB with its optimizer (27 GB with --training_flags "... --save_only_model True", which cannot be
# resumed within a round). LoRA (--lora_enable True, 8 GPUs with 24 GB, no --deepspeed): 2 GB each.
# Expected: a first DPO loss of 0.6931 (ln 2) in every round; the labeler's rejected claims fall, its accepted claims stay within 10 %.
# A flag of this list that is given again replaces it as a whole.
# Usage: scripts/rlaifv_iterations.sh MODEL LABELER DATA OUTPUT [more flags]
#        scripts/rlaifv_iterations.sh llava-hf/llava-1.5-7b-hf llava-hf/llava-1.5-13b-hf prompts.parquet runs/rlaifv
set -euo pipefail

model=$1 labeler=$2 data=$3 output=$4
shift 4
python train/iterate.py \
    --model_name_or_path "$model" \
    --labeler_name_or_path "$labeler" \
    --data_path "$data" \
    --output_dir "$output" \
    --iterations 4 \
    --dtype bfloat16 \
    --nproc_per_node gpu \
    --prompt_name llava_v1 \
    --image_aspect_ratio pad \
    --learning_rate 5e-7 \
    --num_train_epochs 4 \
    --checkpoints_per_epoch 4 \
    --choice_images 100 \
    --heldout_images 200 \
    --generation_flags "--num_answers 10 --temperature 0.7 --max_new_tokens 512" \
    --pair_flags "--max_pairs_per_prompt 2" \
    --training_flags "--per_device_train_batch_size 1 --activation_checkpointing True --deepspeed scripts/train/zero2.json --tf32 True" \
    "$@"
