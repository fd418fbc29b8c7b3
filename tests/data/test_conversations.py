"""Demonstrations of several turns: what the assistant said is learnt, what others said is only read."""

import json

import pytest
import torch
import transformers
from torch.testing import assert_close

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.templates import Style, Template
from rlhf_lab.data.tokenise import text_batch
from rlhf_lab.engine.forward import policy_forward
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Demonstration, Message, Prompt

TALK: tuple[Message, ...] = (
    {"role": "user", "content": "how do i bake bread ?"},
    {"role": "assistant", "content": "mix"},
    {"role": "user", "content": "mix ?"},
    {"role": "assistant", "content": "yes , mix and wait"},
    {"role": "user", "content": "then ?"},
)
SHORT = Prompt.from_text("is it safe ?")
CASES: list[tuple[str, Style]] = [
    ("qwen2", "chat"), ("qwen2", "dialogue"), ("llama", "dialogue"), ("llama", "safe_rlhf"), ("gpt2", "safe_rlhf"),
]  # fmt: skip


def records(every_turn: bool) -> list[Demonstration]:
    return [
        Demonstration(prompt=Prompt.from_messages(TALK), response="bake it", every_turn=every_turn),
        Demonstration(prompt=SHORT, response="no", every_turn=every_turn),
    ]


@pytest.mark.parametrize(("folder", "style"), CASES)
def test_what_the_assistant_said_is_learnt_and_nothing_else(folder: str, style: Style, hf_folder):
    template = Template(load_tokenizer(hf_folder(folder)), style)
    batch = text_batch(template, records(every_turn=True)).sequences
    eos = str(template.tokenizer.eos_token)
    for row, (said, prompt) in enumerate([(["mix", "yes , mix and wait", "bake it"], TALK), (["no"], SHORT.messages)]):
        tokens = batch.tokens[row, batch.prompt_width :][batch.response_mask[row]].tolist()
        ended = style != "dialogue"  # a plain dialogue has no EOS after an earlier turn
        text = "".join(turn + (eos if ended or turn is said[-1] else "") for turn in said)
        assert str(template.tokenizer.decode(tokens)).replace(" ", "") == text.replace(" ", "")
        # what is read is the same as if the last turn alone were learnt
        whole = batch.tokens[row][batch.attention_mask[row]].tolist()
        prompt_tokens = template.prompt_tokens(Prompt.from_messages(prompt))
        assert whole == [*prompt_tokens, *template.response_tokens(said[-1])]
        assert batch.position_ids[row][batch.attention_mask[row]].tolist() == list(range(len(whole)))


def test_learning_every_turn_is_learning_each_after_what_came_before(hf_folder):
    folder = hf_folder("qwen2")
    template = Template(load_tokenizer(folder), "chat")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    whole = policy_forward(model, text_batch(template, records(every_turn=True)).sequences).logprobs
    turns = [(1, "mix"), (3, "yes , mix and wait"), (5, "bake it")]
    singly = [Demonstration(prompt=Prompt.from_messages(TALK[:end]), response=text) for end, text in turns]
    each = policy_forward(model, text_batch(template, singly).sequences).logprobs.sum(1)
    assert_close(whole[0].sum(), each.sum(), atol=1e-4, rtol=0)


def test_the_last_turn_alone_is_learnt_unless_asked(hf_folder):
    template = Template(load_tokenizer(hf_folder("qwen2")), "chat")
    batch = text_batch(template, records(every_turn=False)).sequences
    learnt = batch.tokens[0, batch.prompt_width :][batch.response_mask[0]].tolist()
    assert learnt == template.response_tokens("bake it")
    alone = text_batch(template, records(every_turn=True)[1:]).sequences  # one turn: both are the same
    assert_close(alone.response_mask, torch.ones_like(alone.response_mask))


def test_a_template_that_hides_earlier_turns_is_refused(hf_folder):
    tokenizer = load_tokenizer(hf_folder("qwen2"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ '…' if m['role'] == 'assistant' else m['content'] }}\n{% endfor %}"
    )
    template = Template(tokenizer, "chat")
    with pytest.raises(ValueError, match=r"writes turn 1 of a conversation otherwise .* stage\.turns=last"):
        text_batch(template, records(every_turn=True))


def table(path, **changes) -> Dataset:
    settings = {
        "path": str(path), "revision": None, "columns": {}, "template": "auto", "max_prompt_tokens": 200,
        "max_response_tokens": 64, "bad_rows": "error", "on_conflict": "keep", "train_size": None,
        "train_split": "train", "eval_splits": [], "eval_size": 8, "hold_out": 0.0, "seed": 0,
    }  # fmt: skip
    return Dataset(**settings | changes)


@pytest.mark.parametrize("plain", [False, True], ids=["roles", "texts"])
def test_a_table_may_hold_whole_conversations(tmp_path, plain, hf_folder):
    template = Template(load_tokenizer(hf_folder("qwen2")), "chat")
    turns = [*TALK, {"role": "assistant", "content": "bake it"}]
    talk = [turn["content"] for turn in turns] if plain else turns
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"talk": talk}) + "\n")
    [record] = table(file, columns={"messages": "talk"}).demonstrations("train", template)
    assert record.prompt == Prompt.from_messages(TALK)
    assert record.response == "bake it"
    file.write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"messages": talk[:-1]}) + "\n")
    with pytest.raises(
        ValueError, match=r"talks\.jsonl \(train\), row 1: messages ends with .* the assistant speaks last"
    ):
        table(file).demonstrations("train", template)
    file.write_text(json.dumps({"messages": "hello"}) + "\n")
    with pytest.raises(ValueError, match="row 0: messages is 'hello'; expected a list of turns"):
        table(file).demonstrations("train", template)
