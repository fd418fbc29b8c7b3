#!/usr/bin/env bash
# Every method on the embedded task, everything drawn anew for each seed; finished runs are skipped, a failure stops it.
# bash experiments/methods/run.sh [seeds], 0 1 2 by default; about half an hour a seed on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS_DIR:-runs}

for seed in ${@:-0 1 2}; do
  run() { python launch.py name="methods/$1_s$seed" seed="$seed" artifact_seed="$seed" runs_dir="$runs" "${@:2}"; }

  # value models: held-out accuracy, and correlation with the true score
  for method in reward_model ranking_model probit_reward_model conditioned_reward_model cost_model cost_model_bt; do
    run $method algorithm=$method
  done
  # on own samples, against the ensemble that the main job uses
  for method in ppo ppo_shaped ppo_lag reinforce rloo grpo ci_lag; do
    run $method algorithm=$method reward=ensemble_uwo
  done
  # several rewards
  for method in morlhf pmorl multitask_sft prompting ric ric_online modpo; do
    run $method algorithm=$method
  done
  # from pairs
  for method in dpo dpo_margin simpo dpo_pop dpo_pop_dual simpo_pop; do
    run $method algorithm=$method
  done
  # without training, or from the best of its own samples
  run best_of_n algorithm=best_of_n reward=ensemble_uwo
  run soup algorithm=soup stage.grid=4
  run rejection_sft_policy algorithm=rejection_sft
  run rejection_sft stage=evaluate model.policy="$runs/methods/rejection_sft_policy_s$seed/policy" \
    model.reference="$runs/tiny_help/a$seed/sft/policy"
done
