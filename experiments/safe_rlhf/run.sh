#!/usr/bin/env bash
# Safe RLHF and HC-RLHF: reward and cost models, PPO with and without a constraint, safety tests, arenas, ratings; DPO.
# bash experiments/safe_rlhf/run.sh [seeds], 0 by default; finished runs are skipped, a failure stops it.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS_DIR:-runs} seeds=${*:-0}

for seed in $seeds; do
  at=(runs_dir="$runs" seed="$seed" artifact_seed="$seed")
  run() { python launch.py name="safe_rlhf/$1_s$seed" "${at[@]}" "${@:2}"; }
  of() { echo "$runs/safe_rlhf/$1_s$seed"; }
  sft="$runs/tiny_help/a$seed/sft/policy"

  # preferences and safety labels -> a reward and a cost model, measured on pairs in and out of distribution
  run value_models stage=evaluate_scorers reward=single
  # helpful only; the mean cost below the limit; an upper confidence bound of it below the limit
  for method in ppo ppo_lag ci_lag; do
    run $method algorithm=$method reward=single dataset.eval_splits=[test] stage.evaluate_every=0
  done
  # one prompt set for four tests, so each spends a part of delta
  for method in ci_lag ppo_lag ppo; do
    run safety_$method stage=safety_test stage.alpha_spending=true \
      model.policy="$(of $method)/policy" model.reference="$sft"
  done
  run safety_sft stage=safety_test stage.alpha_spending=true
  # who wins and who is safe, two by two; and everybody against everybody before a judge who errs
  for method in ppo ppo_lag ci_lag; do
    run arena_$method stage=arena reward=single \
      contestants.policies="[$sft,$(of $method)/policy]" contestants.names="[sft,$method]"
  done
  run ratings stage=win_rates judge=simulated contestants.names=[sft,ppo,ppo_lag,ci_lag] \
    contestants.policies="[$sft,$(of ppo)/policy,$(of ppo_lag)/policy,$(of ci_lag)/policy]" \
    '+stage.combinations.both=[helpfulness,harmlessness]'
  # preferences without a reward model at all, with and without margins; do implied margins follow the true ones?
  for method in dpo dpo_margin; do
    run $method algorithm=$method
    run margins_$method stage=evaluate_scorers reward=implicit scorers.preference_policy="$(of $method)/policy"
  done
done
echo "pages: $runs/safe_rlhf/{value_models,safety_ci_lag,arena_ppo_lag,ratings,margins_dpo}_s${seeds%% *}/report.html"
