#!/usr/bin/env bash
# The whole RLAIF-V loop in the tiny image world: a policy learns to hallucinate, then is aligned with AI feedback.
# Hardware: two CPU cores, 4 GB. Time: about 5 minutes, under 2.5 when the cold start is cached (outputs/cache).
# Expected: captions that name an absent object (CHAIRs, greedy) fall by more than a third, recall stays within 5 points.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python train/iterate.py --output_dir outputs/demo --seed 0 "$@"
