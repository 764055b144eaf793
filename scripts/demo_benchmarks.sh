#!/usr/bin/env bash
# What `make demo` made, benchmarked: POPE (random, popular, adversarial) and CHAIR of the policy before and after, their paired
# differences, and best-of-N with the DPO reward on the candidates of both. Hardware: one CPU core. Two minutes (120 s measured).
# Expected for seed 0: CHAIRs 53.5 -> 13.5, recall 82.0 -> 94.1; POPE accuracy random .981 -> .970, popular .968 -> .960, adversarial .965 ->
# .954. Best of 16 by the mean reward, CHAIRs: the reference's candidates 41 -> 14; the policy's own 19 -> 20: it picks what only looks good.
# Usage: scripts/demo_benchmarks.sh COLD ADAPTER OUTPUT [more flags of eval/best_of_n.py]
#        scripts/demo_benchmarks.sh outputs/cache/KEY outputs/demo/round-1/policy outputs/demo-benchmarks
set -euo pipefail

cold=$1 adapter=$2 output=$3
shift 3
for name in before after; do
    if [ "$name" = before ]; then model="$cold/policy"; else model="$adapter"; fi
    python eval/run_benchmarks.py \
        --model_name_or_path "$model" \
        --benchmarks shapeworld \
        --data_root "$cold/world" \
        --output_dir "$output/$name" \
        --dtype float32 \
        --batch_size 64 \
        --num_workers 0
    python data/generate_responses.py \
        --model_name_or_path "$model" \
        --data_path "$cold/world/heldout.parquet" \
        --output_dir "$output/$name/candidates" \
        --num_answers 16 \
        --temperature 1 \
        --max_new_tokens 80 \
        --max_rows 100 \
        --dtype float32 \
        --batch_size 16 \
        --num_workers 0
    python eval/best_of_n.py \
        --model_name_or_path "$adapter" \
        --data_path "$output/$name/candidates" \
        --output_dir "$output/$name/best_of_n" \
        --dtype float32 \
        --num_workers 0 \
        "$@"
done
python eval/run_benchmarks.py --compare "$output/before" "$output/after" --output_dir "$output"
