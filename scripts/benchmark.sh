#!/usr/bin/env bash
# Time and memory of a DPO step and of scoring: muffin, RLAIF-V's computation and TRL's DPOTrainer (pip install -e ".[bench]"), taking turns.
# Hardware: one CPU core and 16 GB of memory of an otherwise idle machine (a wide [min - max] says it was not idle). About 25 minutes; with
# --quick True the v2k cell alone, in under two.
# Expected, as multiples of muffin's time for a full step: v2k rlaifv 1.8, trl 2.7; group2 rlaifv 2.9, group4 4.2; v32k rlaifv 2.5, trl 4.5.
# By FLOPs at LLaVA-1.5-7B: rlaifv 1.8, trl 2.5.
# Usage: scripts/benchmark.sh OUTPUT.json [more flags]
set -euo pipefail

output=$1
shift
python train/benchmark.py \
    --output "$output" \
    --repeats 5 \
    --dtype float32 \
    --num_threads 1 \
    "$@"
