#!/usr/bin/env bash
# The study in order; finished runs are skipped, a failure stops it. About four minutes a seed on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
for seed in 0 1 2 3 4; do
  python launch.py experiments=tiny_help/ppo_lag seed=$seed
done
python experiments/tiny_help/table.py
