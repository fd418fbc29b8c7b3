"""The implicit reward is beta times the log-ratio, token by token."""

import pytest
import torch

from rlhf_lab.data.templates import Template
from rlhf_lab.data.tokenise import rollout_of
from rlhf_lab.engine.hardware import Hardware
from rlhf_lab.engine.models import save_model
from rlhf_lab.engine.tiny import tiny_policy, tiny_tokenizer
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Prompt
from rlhf_lab.rewards.implicit import ImplicitReward

HARDWARE = Hardware(device="cpu", dtype="float32", threads=1)
TEXTS = ["sure !", "first wipe the sponge .", "good luck ! enjoy !"]


@pytest.fixture
def folders(tmp_path):
    """Two random policies."""
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        save_model(tmp_path / str(seed), tiny_policy(seed), tiny_tokenizer())
    return [str(tmp_path / str(seed)) for seed in range(2)]


def reward(policy, reference):
    template = Template(load_tokenizer(policy), "auto")
    source = ImplicitReward(policy=policy, reference=reference, beta=0.25, template="auto", tokens_at_once=64)
    source.check()
    rollout = rollout_of(template, [Prompt.from_text("how do i clean the kitchen ?")] * 3, TEXTS)
    return source.load(HARDWARE, template).score(rollout).value, rollout


def test_it_is_beta_times_the_sum_of_the_tokens_log_ratios(folders):
    found, rollout = reward(*folders)
    expected = []
    for i in range(3):
        ratio = 0.0
        mask = rollout.sequences.attention_mask[i]
        tokens = rollout.sequences.tokens[i][mask][None]
        answer = int(rollout.sequences.response_mask[i].sum())
        for model, sign in zip((tiny_policy(0), tiny_policy(1)), (1, -1), strict=True):
            logprobs = model.eval()(tokens).logits[0].log_softmax(-1)
            places = range(tokens.shape[1] - answer, tokens.shape[1])
            ratio += sign * sum(logprobs[t - 1, tokens[0, t]].item() for t in places)
        expected.append(0.25 * ratio)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_a_policy_that_has_not_moved_rewards_nothing(folders):
    assert reward(folders[0], folders[0])[0].abs().max() == 0
