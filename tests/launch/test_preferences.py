"""All who read a preference read the words of one registry: policies, reward models, judges."""

import pytest
from hydra.utils import instantiate

from rlhf_lab.launch.outlook import described
from rlhf_lab.records import Prompt


def test_the_published_preferences_make_8_combinations_and_16_with_the_later_tones(plan_of):
    node = plan_of("stage=evaluate", "conditions=personalized_soups").config["preferences"]
    published = instantiate(node)
    assert published.names == ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B", "P3C", "P3D")
    assert len(published.combinations) == 16
    assert sum({"P3C", "P3D"}.isdisjoint(held) for held in published.combinations) == 8


@pytest.mark.parametrize("name", ["tiny_help", "personalized_soups"])
def test_policy_reward_model_and_judge_read_the_words_of_the_registry(name: str, plan_of):
    """The original has a preference in several wordings, and looks for one in texts that hold another."""
    typed = ["algorithm=pmorl", f"preferences={name}"]
    source = "reward.sources.helpful.condition"
    first = next(iter(instantiate(plan_of(*typed).config["preferences"]).names))
    plan = plan_of(*typed, f"+{source}=${{preferences.reward_model.{first}}}")
    registry = instantiate(plan.config["preferences"])
    conditions = instantiate(plan.config["stage"]["conditions"])
    assert plan.config["model"]["new_tokens"] == list(registry.new_tokens)
    told = conditions.evaluated([Prompt.from_text("x")])[first][0].condition
    assert told == registry.wordings["policy"][first]
    assert plan.config["stage"]["rewards"]["helpful"]["condition"] == registry.wordings["reward_model"][first]
    judged = plan_of("stage=judge_pairs", f"preferences={name}", "judge=openai", "dataset=table", "dataset.path=x")
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
