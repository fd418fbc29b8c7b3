#!/usr/bin/env bash
# Rewards-in-Context against MORLHF, rewarded soups and MODPO: fronts of helpfulness and humour, control, hours.
# bash experiments/rewards_in_context/run.sh [seeds], 0 by default; finished runs are skipped, a failure stops it.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS_DIR:-runs} seeds=${*:-0}

for seed in $seeds; do
  at=(runs_dir="$runs" seed="$seed" artifact_seed="$seed")
  run() { python launch.py name="rewards_in_context/$1_s$seed" "${at[@]}" "${@:2}"; }
  # both responses of each pair with their scores by the two reward models, which are made when they are first read
  python launch.py experiments=tiny_help/scored_preferences "${at[@]}"
  # one policy told each trade-off, offline and then online; two policies of one reward each, mixed
  run ric_online algorithm=ric_online
  compared=('${artifact:tiny_help/soup_lattice}' "$runs/rewards_in_context/ric_online_s$seed") methods=(soup ric_online)
  # one policy for each weight
  for weights in 0.25,0.75 0.5,0.5 0.75,0.25; do
    helpful=${weights%,*} humour=${weights#*,}
    run morlhf_$helpful algorithm=morlhf objective.weights.helpful=$helpful objective.weights.humour=$humour \
      dataset.eval_splits=[test] stage.evaluate_every=0
    run modpo_$helpful algorithm=modpo algorithm.weight=$helpful algorithm.others.humour=$humour \
      evaluation_dataset.eval_splits=[test]
    compared+=("$runs/rewards_in_context/morlhf_${helpful}_s$seed" "$runs/rewards_in_context/modpo_${helpful}_s$seed")
    methods+=(morlhf modpo)
  done
  run pareto stage=pareto "stage.runs=[$(IFS=,; echo "${compared[*]}")]" \
    "stage.methods=[$(IFS=,; echo "${methods[*]}")]"
done
echo "page: $runs/rewards_in_context/pareto_s${seeds%% *}/report.html"
