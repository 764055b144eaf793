#!/usr/bin/env bash
# Rule-based hallucination benchmarks of one policy: POPE (random, popular, adversarial), AMBER, CHAIR. Greedy answers.
# Hardware: one or more GPUs of 24 GB (a 7B policy in bfloat16 takes 14 GB). Hours: not measured here. Killed: run it again.
# Expected: LLaVA-1.5-7B on POPE random has accuracy .870, F1 .855, yes ratio .397.
# DATA holds val2014/ (COCO pictures), annotations/ (COCO), pope/coco_pope_*.json, AMBER/ (the repository, pictures in AMBER/images),
# chair/questions.jsonl (image, question) and chair/synonyms.txt.
# Usage: scripts/evaluate.sh MODEL DATA OUTPUT [more flags of data/generate_responses.py]
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
for split in random popular adversarial; do
    torchrun --standalone --nproc_per_node gpu data/generate_responses.py \
        --model_name_or_path "$model" \
        --data_path "$data/pope/coco_pope_$split.json" \
        --column_map question=text \
        --image_root "$data/val2014" \
        --output_dir "$output/pope_$split" \
        --num_answers 1 \
        --temperature 0 \
        --max_new_tokens 64 \
        "$@"
    python eval/pope.py \
        --questions "$data/pope/coco_pope_$split.json" \
        --answers "$output/pope_$split" \
        --output "$output/pope_$split.json"
done

torchrun --standalone --nproc_per_node gpu data/generate_responses.py \
    --model_name_or_path "$model" \
    --data_path "$data/AMBER/data/query/query_all.json" \
    --column_map question=query \
    --image_root "$data/AMBER/images" \
    --output_dir "$output/amber" \
    --num_answers 1 \
    --temperature 0 \
    --max_new_tokens 512 \
    "$@"
python eval/amber.py \
    --annotations "$data/AMBER/data/annotations.json" \
    --relation "$data/AMBER/data/relation.json" \
    --safe_words "$data/AMBER/data/safe_words.txt" \
    --answers "$output/amber" \
    --output "$output/amber.json"

torchrun --standalone --nproc_per_node gpu data/generate_responses.py \
    --model_name_or_path "$model" \
    --data_path "$data/chair/questions.jsonl" \
    --image_root "$data/val2014" \
    --output_dir "$output/chair" \
    --num_answers 1 \
    --temperature 0 \
    --max_new_tokens 512 \
    "$@"
python eval/chair.py \
    --answers "$output/chair" \
    --synonyms "$data/chair/synonyms.txt" \
    --coco_annotations "$data/annotations" \
    --output "$output/chair.json"
