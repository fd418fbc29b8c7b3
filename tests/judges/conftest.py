"""A judge at a server on this machine, as conf/judge/openai.yaml builds it, with patience in milliseconds."""

import dataclasses

import pytest

from rlhf_lab.judges.endpoint import Decoding, Endpoint, Prices
from rlhf_lab.judges.language_model import LanguageModelJudge

ENDPOINT = Endpoint(
    base_url="http://127.0.0.1:9/v1",
    api_key_env=None,
    concurrency=8,
    timeout=5.0,
    tries=4,
    first_wait=0.01,
    longest_wait=1.0,
    requests_per_minute=None,
    tokens_per_minute=None,
)
DECODING = Decoding(
    model="scripted", temperature=0.0, top_p=1.0, seed=0, max_tokens=50, limit_field="max_tokens", structured=False
)


@pytest.fixture
def judge_at(tmp_path):
    """`judge_at(server, key=value, …)`: keys of the endpoint, of its decoding, or of the judge."""

    def make(server, **changes):
        base = {} if server is None else {"base_url": server.url}
        parts = []
        for part in (ENDPOINT, DECODING):
            mine = {name: changes.pop(name) for name in list(changes) if hasattr(part, name)}
            parts.append(dataclasses.replace(part, **(base if part is ENDPOINT else {}), **mine))
        settings = {
            "prices": Prices(prompt=10.0, reply=100.0),
            "rubrics": {"helpfulness": "helpfulness"},
            "wording": {"funny": "Which response is funnier?"},
            "preference_rubric": "preference",
            "reasoning": False,
            "demonstrations": False,
            "pairs_per_call": 1,
            "both_orders": True,
            "rereads": 2,
            "spend_cap": None,
            "ledger": str(tmp_path / "judgements"),
            "replay": "ask",
            "dry_run": False,
            "tokenizer": None,
        }
        return LanguageModelJudge(endpoint=parts[0], decoding=parts[1], **(settings | changes))

    return make
