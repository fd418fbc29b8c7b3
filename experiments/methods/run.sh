#!/usr/bin/env bash
# Every method on the embedded task, everything drawn anew for each seed; finished runs are skipped, a failure stops it.
# bash experiments/methods/run.sh [seeds], 0 1 2 by default; three took an hour and ten minutes
# in two processes on two busy cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

for seed in ${@:-0 1 2}; do
  run() { python launch.py name="methods/$1_s$seed" seed="$seed" artifact_seed="$seed" "${@:2}"; }
  ends="dataset.eval_splits=[test]"

  # value models: held-out accuracy
  for method in reward_model ranking_model probit_reward_model conditioned_reward_model cost_model cost_model_bt; do
    run $method algorithm=$method
  done
  # on own samples, against the ensemble that the main job uses; several rewards
  for method in ppo ppo_shaped ppo_lag reinforce rloo grpo ci_lag; do
    run $method algorithm=$method reward=ensemble_uwo $ends stage.evaluate_every=0
  done
  for method in morlhf pmorl; do run $method algorithm=$method $ends stage.evaluate_every=0; done
  # from pairs, and by supervision
  for method in dpo dpo_margin simpo dpo_pop dpo_pop_dual simpo_pop modpo ric ric_online multitask_sft; do
    run $method algorithm=$method
  done
  # without training, or from the best of its own samples
  run prompting algorithm=prompting $ends
  run best_of_n algorithm=best_of_n reward=ensemble_uwo
  run soup algorithm=soup stage.grid=4 $ends
  run rejection_sft_policy algorithm=rejection_sft
  run rejection_sft stage=evaluate $ends model.policy="runs/methods/rejection_sft_policy_s$seed/policy" \
    model.reference="runs/tiny_help/a$seed/sft/policy"
done
python experiments/methods/table.py
