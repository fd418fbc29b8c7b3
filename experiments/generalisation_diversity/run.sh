#!/usr/bin/env bash
# Generalisation and diversity: SFT, best of n and PPO, in and out of distribution, with many samples per prompt.
# bash experiments/generalisation_diversity/run.sh [seeds], 0 by default; finished runs are skipped, a failure stops it.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS_DIR:-runs} seeds=${*:-0}

for seed in $seeds; do
  at=(runs_dir="$runs" seed="$seed" artifact_seed="$seed")
  run() { python launch.py name="generalisation_diversity/$1_s$seed" "${at[@]}" "${@:2}"; }
  of() { echo "$runs/generalisation_diversity/$1_s$seed"; }
  sft="$runs/tiny_help/a$seed/sft/policy"
  # held-out demonstrations are the references: how often does a judge prefer the policy to them?
  against=(stage=evaluate reward=single judge=simulated stage.references=true stage.criteria=[helpfulness]
    stage.samples_per_prompt=8)

  run ppo algorithm=ppo reward=single dataset.eval_splits=[test] stage.evaluate_every=0
  run evaluate_sft "${against[@]}"
  run evaluate_ppo "${against[@]}" model.policy="$(of ppo)/policy" model.reference="$sft"
  run best_of_n algorithm=best_of_n reward=single dataset.eval_splits=[test,ood_domain,ood_template,ood_items] \
    stage.samples_per_prompt=64 stage.prompts=64
  # the gap of each, by the true scores, the reward model and the judge
  run generalisation stage=generalisation "+stage.policies.sft=$(of evaluate_sft)" \
    "+stage.policies.ppo=$(of evaluate_ppo)"
  # of the eight responses to each prompt, and across prompts; at equal length, and of the best of four, too
  run diversity stage=diversity stage.sentence_model=embedded:minilm stage.best_of.by=score_helpful \
    "stage.splits=[test,ood_items]" \
    "stage.generations={sft: $(of evaluate_sft), ppo: $(of evaluate_ppo)}"
done
echo "pages: $runs/generalisation_diversity/{generalisation,best_of_n,diversity}_s${seeds%% *}/report.html"
