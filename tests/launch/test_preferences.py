"""All who read a preference read the words of one registry: policies, reward models, judges."""

from hydra.utils import instantiate

from rlhf_lab.launch.outlook import described
from rlhf_lab.records import Prompt


def test_policy_reward_model_and_judge_read_the_words_of_the_registry(plan_of):
    """The original has a preference in several wordings, and looks for one in texts that hold another."""
    typed = ["algorithm=pmorl", "preferences=personalized_soups"]
    source = "reward.sources.helpful.condition"
    first = "P2A"
    plan = plan_of(*typed, f"+{source}=${{preferences.reward_model.{first}}}")
    registry = instantiate(plan.config["preferences"])
    assert len(registry.combinations) == 16  # of which 8 without the two later tones
    assert sum({"P3C", "P3D"}.isdisjoint(held) for held in registry.combinations) == 8
    conditions = instantiate(plan.config["stage"]["conditions"])
    assert plan.config["model"]["new_tokens"] == list(registry.new_tokens)
    told = conditions.evaluated([Prompt.from_text("x")])[first][0].condition
    assert told == registry.wordings["policy"][first]
    assert plan.config["stage"]["rewards"]["helpful"]["condition"] == registry.wordings["reward_model"][first]
    judged = plan_of(
        "stage=judge_pairs", "preferences=personalized_soups", "judge=openai", "dataset=table", "dataset.path=x"
    )
    assert judged.config["stage"]["judge"]["wording"] == registry.wordings["judge"]
    assert instantiate(judged.config["stage"]["preferences"]).wordings == registry.wordings


def test_one_reward_model_scores_under_each_preference_in_the_words_that_it_learnt(plan_of):
    plan = plan_of("algorithm=pmorl", "reward=preferred")
    sources = plan.config["stage"]["rewards"]
    taught = plan_of("experiments=tiny_help/judged_preferences").config["stage"]["preferences"]["reward_model"]
    assert {name: sources[name]["condition"] for name in taught} == taught
    assert sources["helpful"]["members"] == sources["humour"]["members"]
    [model] = [need for need in plan.needs if need.directory.name == "preference_model_s0"]
    assert [need.directory.name for need in model.needs if "judged" in need.directory.name] == ["judged_preferences"]


def test_a_mixture_is_described_by_where_its_parts_are(plan_of):
    assert described(plan_of("algorithm=multitask_sft").config)["data"] == "embedded:tiny_help"
