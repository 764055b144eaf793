#!/usr/bin/env bash
# Hallucination benchmarks of one policy, rule-based: POPE (random, popular, adversarial), AMBER, CHAIR. Greedy answers, one table.
# Hardware: one or more GPUs of 24 GB (a 7B policy in bfloat16 takes 14 GB). Hours: not measured here. Killed: run it again.
# Expected: LLaVA-1.5-7B on POPE random has accuracy .870, F1 .855, yes ratio .397.
# DATA holds val2014/ (COCO pictures), annotations/ (COCO), pope/coco_pope_*.json, AMBER/ (the repository, pictures in AMBER/images),
# chair/questions.jsonl (image, question) and chair/synonyms.txt.
# Usage: scripts/evaluate.sh MODEL DATA OUTPUT [more flags of eval/run_benchmarks.py]
# Two policies: python eval/run_benchmarks.py --compare OUTPUT_OF_THE_BASE OUTPUT
set -euo pipefail

model=$1 data=$2 output=$3
shift 3
python eval/run_benchmarks.py \
    --model_name_or_path "$model" \
    --data_root "$data" \
    --output_dir "$output" \
    --benchmarks pope,amber,chair \
    --nproc_per_node gpu \
    "$@"
