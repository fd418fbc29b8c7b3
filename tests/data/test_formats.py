"""Any conversation is read back from its text as it was written, or it is refused; random texts, seeded."""

import random
import string

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_lab.data.formats import DIALOGUE, HUMAN_ASSISTANT, Alpaca, Chat, Format, Plain, SafeRlhf, build
from rlhf_lab.data.templates import Template
from rlhf_lab.records import Message, Prompt

# what a model's chat template looks like: markers of special tokens, or of letters alone
CHATML = "".join(
    [
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    ]
)
LETTERS = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no place for a system') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }};;{% endif %}{% endfor %}"
)
ROLES = ("user", "assistant")
ALONE = ("alpaca", "tldr")


def chat(template: str) -> Chat:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_empty(), chat_template=template)

    def render(messages):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    return Chat(render=render, special=("<|im_start|>", "<|im_end|>"))


def load_empty():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))


FORMATS: dict[str, Format] = {
    "dialogue": DIALOGUE,
    "human_assistant": HUMAN_ASSISTANT,
    "safe_rlhf": SafeRlhf(eos="</s>"),
    "alpaca": Alpaca(),
    "tldr": Plain(),
    "chatml": chat(CHATML),
    "letters": chat(LETTERS),
}
PIECES = [
    "\n\nHuman: ", "\n\nAssistant:", "Human:", "\n\nUser: ", "User:", "\n", "\n\n", " ", "", "USER: ", " ASSISTANT:",
    "</s>", "BEGINNING OF CONVERSATION: ", "\n\n### Input:\n", "\n\n### Response:", "### Response:", "TL;DR:", "Paris",
    "\n\n### Instruction:\n", "<|im_end|>\n", "<|im_start|>user\n", "[INST] ", " [/INST] ", ";;", "probe0q", "<think>",
    "s", "\x00", "e\u0301",
]  # fmt: skip


def texts(draw: random.Random) -> str:
    """Anything: letters of all scripts, controls, line ends; and the formats' own pieces, whole or cut."""
    ranges = draw.choices([(1, 0xD800), (0xE000, 0x11000), (32, 127)], k=draw.randrange(6))
    letters = [chr(draw.randrange(*each)) for each in ranges]
    pieces = [piece[draw.randrange(0, 2) :] for piece in draw.choices(PIECES, k=draw.randrange(4))]
    mixed = [*letters, *pieces]
    draw.shuffle(mixed)
    return "".join(mixed)


def conversation(draw: random.Random, turns: int) -> tuple[Message, ...]:
    return tuple(Message(role=ROLES[turn % 2], content=texts(draw)) for turn in range(2 * turns - 1))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_is_what_was_written_and_all_else_is_refused(name: str):
    form, draw, refused = FORMATS[name], random.Random(f"formats {name}"), 0
    for _ in range(400):
        messages = conversation(draw, 1 if name in ALONE else draw.randrange(1, 4))
        bad = any(marker in message["content"] for marker in form.markers for message in messages)
        if bad:
            refused += 1
            with pytest.raises(ValueError, match=r"holds .* which tells the turns apart"):
                build(form, messages)
        else:
            assert form.parse(build(form, messages)) == messages
    assert 0 < refused < 350 or name == "tldr"


@pytest.mark.parametrize("name", FORMATS)
def test_no_letter_is_lost_at_either_end(name: str):
    form = FORMATS[name]
    for letter in [*string.printable, "s", "é", "\u2028", "</s", "<"]:
        for text in (letter, f"{letter}a{letter}", f"other person{letter}", f"{letter}{letter}"):
            messages = (Message(role="user", content=text),)
            assert form.parse(build(form, messages)) == messages


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dialogue", "hello"),
        ("dialogue", "User: hello"),
        ("dialogue", "User: hello\n\nAssistant: fine"),
        ("human_assistant", "Human: hello\n\nAssistant:"),
        ("safe_rlhf", "USER: hello ASSISTANT:"),
        ("safe_rlhf", "BEGINNING OF CONVERSATION: "),
        ("safe_rlhf", "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:fine"),
        ("safe_rlhf", "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:fine</s>"),
        ("safe_rlhf", "BEGINNING OF CONVERSATION: hello ASSISTANT:"),
        ("alpaca", "### Instruction:\nhello\n\n### Response:"),
        ("chatml", "<|im_start|>user\nhello<|im_end|>\n"),
        ("letters", "[INST] hello"),
    ],
)
def test_a_text_of_another_format_is_refused(name: str, text: str):
    with pytest.raises(ValueError, match=r"convers|way|speak"):
        FORMATS[name].parse(text)


def test_a_systems_words_come_first_where_there_is_a_place_for_them():
    talk = tuple(
        Message(role=r, content=c)
        for r, c in [("system", "be kind"), ("user", "hi"), ("assistant", "yes"), ("user", "then ?")]
    )
    for name in ("dialogue", "chatml"):
        assert FORMATS[name].parse(build(FORMATS[name], talk)) == talk
    for name in ("safe_rlhf", "alpaca", "human_assistant"):
        with pytest.raises(ValueError, match=r"dataset\.template="):
            build(FORMATS[name], talk)


def test_alpaca_writes_an_instruction_in_one_of_two_ways():
    # as spelled out in the release of Stanford Alpaca
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    assert Alpaca().write(({"role": "user", "content": "Add.\n\n### Input:\n1, 2"},)) == with_input
    assert Alpaca().write(({"role": "user", "content": "Add."},)) == without


def test_a_template_that_writes_turns_otherwise_each_time_cannot_be_read_back_but_is_guarded_by_its_tokens():
    form = chat("{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}")
    assert form.markers == ["<|im_start|>", "<|im_end|>"]
    with pytest.raises(ValueError, match="is no conversation"):
        form.parse("1: hi\n")


@pytest.mark.parametrize(
    ("folder", "style"),
    [
        ("qwen2", "chat"),
        ("gpt2", "dialogue"),
        ("opt", "safe_rlhf"),
        ("llama", "alpaca"),
        ("gpt2", "tldr"),
        ("opt", "tldr"),
    ],
)
def test_tokens_hold_the_conversation_with_one_beginning_and_one_end(folder: str, style, write_tokenizer):
    tokenizer = write_tokenizer(folder, 40)
    template = Template(tokenizer, style)
    draw = random.Random(f"tokens {folder} {style}")
    read = 0
    for _ in range(40):
        messages = conversation(draw, 1 if style in ALONE else draw.randrange(1, 3))
        prompt = Prompt.from_messages(messages)
        if not prompt.request or template.fault(prompt, ["fine"]):
            continue
        read += 1
        tokens = [*template.prompt_tokens(prompt), *template.response_tokens("yes")]
        begins = tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # opt: with the token that ends, too
        within = {"chat": len(messages), "safe_rlhf": len(messages) // 2}.get(style, 0)  # earlier turns end as well
        same = tokenizer.bos_token_id == tokenizer.eos_token_id
        assert tokens.count(tokenizer.eos_token_id) == 1 + within + (begins and same)
        assert tokens[-1] == tokenizer.eos_token_id
        if begins and not same:
            assert (tokens[0], tokens.count(tokens[0])) == (tokenizer.bos_token_id, 1)
        assert [template.prompts_tokens([prompt])[0], template.responses_tokens(["yes"])[0]] == [
            template.prompt_tokens(prompt),
            template.response_tokens("yes"),
        ]
    assert read > 15


def test_rows_whose_texts_would_be_read_as_more_than_their_letters_are_told(write_tokenizer):
    template = Template(write_tokenizer("qwen2", 40), "chat")
    eos = str(template.tokenizer.eos_token)
    assert template.fault(Prompt.from_text("hi"), ["fine"]) == ""
    assert "a prompt that holds" in template.fault(Prompt.from_text(f"hi {eos} there"), ["fine"])
    assert "a response that holds" in template.fault(Prompt.from_text("hi"), ["fine", f"a{eos}"])
    plain = Template(write_tokenizer("gpt2", 40), "dialogue")
    assert "'\\n\\nAssistant:'" in plain.fault(Prompt.from_text("hi\n\nAssistant: yes"), [])
    assert plain.fault(Prompt.from_text("hi"), ["see\n\nUser: this"]) == ""  # a response ends with its EOS alone


def test_a_summary_follows_its_post_after_a_space(write_tokenizer):
    tokenizer = write_tokenizer("gpt2", 40)
    template = Template(tokenizer, "tldr")
    post = "SUBREDDIT: r/x\nTITLE: t\nPOST: p\nTL;DR:"
    for summary in ("she left", " she left"):
        tokens = [*template.prompt_tokens(Prompt.from_text(post)), *template.response_tokens(summary)]
        assert tokens == tokenizer(f"{post} she left{tokenizer.eos_token}").input_ids
    assert template.response_tokens("") == [template.eos]
    assert template.text(template.response_tokens("she left")) == "she left"
