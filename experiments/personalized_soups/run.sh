#!/usr/bin/env bash
# Personalized soups: pairs judged under preferences, a reward model told which, PPO, soups, P-MORL; win rates, ratings.
# bash experiments/personalized_soups/run.sh [seeds], 0 by default; finished runs are skipped, a failure stops it.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS_DIR:-runs} seeds=${*:-0}

for seed in $seeds; do
  at=(runs_dir="$runs" seed="$seed" artifact_seed="$seed")
  run() { python launch.py name="personalized_soups/$1_s$seed" "${at[@]}" "${@:2}"; }
  of() { echo "$runs/personalized_soups/$1_s$seed"; }
  # every method is measured under each preference and under both, and rewarded by the one reward model
  told=(reward=preferred 'model.new_tokens=${preferences.new_tokens}' dataset.eval_splits=[test])
  # policies learn from one that demonstrations taught the words
  start=("${told[@]}" 'model.policy=${artifact:tiny_help/multitask_sft}' stage.steps=40 stage.evaluate_every=0)

  # pairs sampled under each preference -> judged in both orders by a judge who errs -> one reward model
  python launch.py experiments=tiny_help/preference_model "${at[@]}"
  # one PPO policy for each preference, told that one alone, and their soups; one policy for all (P-MORL); PPO that is
  # told nothing; and words alone
  run ppo_helpful algorithm=pmorl "${start[@]}" conditions=preferences preferences=tiny_help_helpful \
    objective.streams=[helpful] reward.sources.humour=null
  run ppo_humour algorithm=pmorl "${start[@]}" conditions=preferences preferences=tiny_help_humour \
    objective.streams=[humour] reward.sources.helpful=null
  run pmorl algorithm=pmorl "${start[@]}"
  run soup algorithm=soup "${told[@]}" conditions=tiny_help stage.grid=4 \
    stage.policies="[$(of ppo_helpful)/policy,$(of ppo_humour)/policy]"
  run ppo algorithm=prompting "${told[@]}" 'model.policy=${artifact:tiny_help/ppo_helpful}'
  run prompting algorithm=prompting "${told[@]}"
  # judged by each criterion and by both together, under each combination of preferences
  run ratings stage=win_rates judge=simulated stage.criteria=[helpful,humour] \
    '+stage.combinations.both=[helpful,humour]' \
    contestants.names=[prompting,ppo,multitask_sft,pmorl,soup] \
    contestants.policies="[$(of prompting),$(of ppo),$runs/tiny_help/a$seed/multitask_sft,$(of pmorl),$(of soup)]"
done
echo "pages: $runs/personalized_soups/{ratings,soup,pmorl}_s${seeds%% *}/report.html"
