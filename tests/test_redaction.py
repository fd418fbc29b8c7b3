"""What counts as a secret, and that it is left out or refused."""

import pytest

from rlhf_lab.redaction import PLACE, redact, refuse_secrets, secrets

PLANTED = "abcd1234efgh5678"


def test_secrets_are_known_by_the_words_of_their_names():
    environment = {
        "WANDB_API_KEY": PLANTED,
        "HF_TOKEN": PLANTED,
        "MY_PASSWORD_2": PLANTED,
        "TOKENIZERS_PARALLELISM": "false and more",
        "MONKEY_BUSINESS": PLANTED,
        "HF_TOKEN_PATH": "/home/someone/token",
        "SHORT_KEY": "abc",
    }
    assert set(secrets(environment)) == {"WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD_2"}


def test_a_secret_is_left_out_of_a_text_wherever_it_stands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", PLANTED)
    monkeypatch.setenv("LONGER_KEY", f"{PLANTED}-and-more")
    assert redact(f"a{PLANTED}b, {PLANTED}-and-more.") == f"a{PLACE}b, {PLACE}."


@pytest.mark.parametrize(
    "spelled",
    ["sk-proj-" + "a1B2" * 6, "hf_" + "aB3" * 10, "ghp_" + "aB3" * 10, "AKIA" + "ABCD" * 4, "xoxb-" + "12345-abcde"],
)
def test_what_is_spelled_like_a_key_is_one(spelled: str):
    assert redact(f"key={spelled}\n") == f"key={PLACE}\n"
    with pytest.raises(ValueError, match=r"judge.model of the command line holds a secret") as refused:
        refuse_secrets({"judge": {"model": [f"prefix {spelled}"]}}, "command line")
    assert spelled not in str(refused.value)


def test_a_configuration_with_a_secret_is_refused_by_value_and_by_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", PLANTED)
    for config in ({"tracker": {"project": f"x{PLANTED}"}}, {"tracker": {"api_key": "0123456789abcdef"}}):
        with pytest.raises(ValueError, match=r"holds a secret.*environment variable") as refused:
            refuse_secrets(config, "configuration")
        assert PLANTED not in str(refused.value)


def test_ordinary_settings_are_not_refused():
    refuse_secrets(
        {
            "model": {"new_tokens": ["<helpful>"], "policy": "org/model-7b-instruct-v0.2"},
            "judge": {"key_env": "OPENAI_API_KEY", "base_url": "http://localhost:8000/v1"},
            "dataset": {"columns": {"key": "prompt"}, "task": "task-oriented-dialogues-2024"},
        },
        "configuration",
    )


KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("line", [f"export WANDB_API_KEY={KEY}", f"ALL,HF_TOKEN='{KEY}'"])
def test_a_secret_that_a_line_of_shell_sets_is_refused(line: str):
    with pytest.raises(ValueError, match=r"executor.setup of the configuration holds a secret") as refused:
        refuse_secrets({"executor": {"setup": ["module load cuda", line]}}, "configuration")
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "line", ["export HF_TOKEN=/home/me/token-0123456789", "export BATCH_0123456789=0123456789012345"]
)
def test_a_line_of_shell_without_a_secret_stays(line: str):
    refuse_secrets({"executor": {"setup": [line]}}, "configuration")
