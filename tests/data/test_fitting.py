"""Rows are measured many at once as they would be one by one; the same ones are kept once."""

import pytest

from rlhf_lab.data import fitting
from rlhf_lab.data.fitting import Limits, measure
from rlhf_lab.data.templates import Style, Template
from rlhf_lab.engine.tiny import tiny_tokenizer
from rlhf_lab.records import Prompt
from tests.data.tables import numbered, written

TEMPLATE = Template(tiny_tokenizer(), "auto")
LIMITS = Limits(max_prompt_tokens=12, max_response_tokens=8, min_prompt_tokens=5, min_response_tokens=3)


def items(n: int):
    """Rows of all lengths, every third prompt and every fifth row there before."""
    made = []
    for i in range(n):
        k = i - 4 if i % 5 == 4 else i
        prompt = Prompt.from_text("bake " * (1 + k % 3 * 4) + f"{k // 3}")
        made.append((prompt, ("mix " * (k % 11), "wait " + "stir " * (k % 4))))
    return made


@pytest.mark.parametrize("style", ["chat", "dialogue", "safe_rlhf"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_lengths_and_faults_are_those_of_one_row_after_the_other(monkeypatch, style: Style, chunk):
    monkeypatch.setattr(fitting, "CHUNK", chunk)
    template = Template(tiny_tokenizer(), style)
    rows = items(60)
    found = measure("d", rows, template, LIMITS, "exact", distinct=True)
    for i, (prompt, texts) in enumerate(rows):
        spoken = [len(template.response_tokens(text)) for text in texts]
        if not texts[0].strip():
            assert found.faults[i] == "an empty response"
            continue
        assert found.prompt_tokens[i] == len(template.prompt_tokens(prompt))
        assert found.response_tokens[i].tolist() == spoken
        long = len(template.prompt_tokens(prompt)) > 12 and "a prompt over"
        wide = max(spoken) > 8 and "a response over"
        short = len(template.prompt_tokens(prompt)) < 5 and "a prompt under"
        brief = min(spoken) < 3 and "a response under"
        assert found.faults[i].startswith(long or wide or short or brief or "")
        assert bool(found.faults[i]) == bool(long or wide or short or brief)


def test_many_texts_become_the_tokens_that_each_becomes_alone():
    prompts = [prompt for prompt, _ in items(20)]
    texts = [text for _, both in items(20) for text in both]
    for style in ("chat", "dialogue", "safe_rlhf"):
        template = Template(tiny_tokenizer(), style)
        assert template.prompts_tokens(prompts) == [template.prompt_tokens(prompt) for prompt in prompts]
        assert template.responses_tokens(texts) == [template.response_tokens(text) for text in texts]


def test_rows_that_differ_in_case_and_white_space_are_the_same_if_it_is_said_so(tmp_path):
    rows = [*numbered(3, response="say {}"), {"prompt": " PROMPT  1", "response": "Say\n1 "}]
    exact = written(tmp_path, {"train": rows}, bad_rows="drop")
    assert len(exact.demonstrations("train", TEMPLATE)) == 4
    normalised = written(tmp_path, {"train": rows}, bad_rows="drop", duplicates="normalised")
    kept = normalised.demonstrations("train", TEMPLATE)
    assert [record.response for record in kept] == ["say 0", "say 1", "say 2"]
    [counted] = normalised.counted.as_json()
    assert counted["dropped"] == {"a duplicate of an earlier row": 1}


def test_short_rows_are_counted_too(tmp_path):
    rows = [*numbered(3, response="mix it and wait"), {"prompt": "long enough", "response": "mix"}]
    data = written(tmp_path, {"train": rows}, bad_rows="drop", min_response_tokens=3)
    assert len(data.demonstrations("train", TEMPLATE)) == 3
    assert data.counted.as_json()[0]["dropped"] == {"a response under dataset.min_response_tokens=3": 1}
