"""The commands that are killed: the main job and one of each family of methods, small, but with several checkpoints."""

FAMILIES = {
    "main job": ("stage.steps=8", "stage.checkpoint_every=2", "stage.evaluate_every=4"),  # ppo_lag, ensemble_uwo
    "without critic": ("algorithm=ci_lag", "stage.steps=8", "stage.checkpoint_every=2", "stage.evaluate_every=4"),
    "from preferences": (
        "algorithm=dpo_margin",
        "stage.epochs=3",
        "stage.checkpoint_every=2",
        "stage.evaluate_every=4",
    ),
    "rewards in context": ("algorithm=ric_online", "stage.checkpoint_every=2", "stage.prompts_per_shard=16"),
    "best of n": ("algorithm=best_of_n", "stage.prompts_per_shard=3"),
}
