#!/usr/bin/env bash
# The demo for seeds 0, 1 and 2, and one table of all three.
# Hardware: two CPU cores, 4 GB. Time: about 15 minutes, the most of it three cold starts.
# Expected: object CHAIRs (greedy) falls by more than a third for every seed, recall falls by no more than 5 points.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for seed in 0 1 2; do
    scripts/demo.sh --output_dir "outputs/demo-$seed" --seed "$seed" "$@"
done
python eval/compare_runs.py --runs outputs/demo-0 outputs/demo-1 outputs/demo-2 --output outputs/seeds.md --numbers outputs/seeds.json
