#!/usr/bin/env bash
# Reward-model ensembles: noisy preferences, five reward models, best of n, RL, and over-optimisation at equal KL.
# bash experiments/reward_ensembles/run.sh [seeds], 0 by default; finished runs are skipped, a failure stops it.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS_DIR:-runs} sweeps=${SWEEPS_DIR:-sweeps} seeds=${*:-0}

for seed in $seeds; do
  at=(runs_dir="$runs" seed="$seed" artifact_seed="$seed")
  # 256 samples of each of 80 prompts, scored once by five reward models that learnt from 25 % noise: every ensemble
  # chooses from the same samples
  python launch.py name="reward_ensembles/best_of_n_s$seed" stage=best_of_n_curve "${at[@]}"
  # RL against one model and against three ensembles, without a KL penalty and with one
  for beta in 0.0 0.02; do
    python launch.py -m sweep="reward_ensembles_kl${beta}_s$seed" sweeps_dir="$sweeps" algorithm=rloo \
      reward=single,ensemble_uwo,ensemble_wco,ensemble_mean algorithm.kl_coef=$beta learner.lr.policy=7e-4 \
      dataset.eval_splits=[test] dataset.eval_size=128 stage.steps=40 stage.evaluate_every=4 "${at[@]}"
  done
done

first=${seeds%% *}
for beta in 0.0 0.02; do
  of=""; for seed in $seeds; do of+=",$sweeps/reward_ensembles_kl${beta}_s$seed"; done
  python launch.py name="reward_ensembles/overoptimisation_kl$beta" stage=overoptimisation \
    "stage.runs=[${of:1}]" stage.baseline=single stage.best_of_n="$runs/reward_ensembles/best_of_n_s$first" \
    stage.best_of_n_by=[uwo_0.5] runs_dir="$runs" seed="$first"
done
echo "pages: $runs/reward_ensembles/{best_of_n_s$first,overoptimisation_kl0.0,overoptimisation_kl0.02}/report.html"
