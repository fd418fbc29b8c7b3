"""How conversations are written, against texts spelled out by hand."""

from collections.abc import Callable

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from rlhf_lab.data.templates import Style, Template
from rlhf_lab.engine.tokenizer import load_tokenizer
from rlhf_lab.records import Message, Prompt

Folder = Callable[..., str]
TALK: tuple[Message, ...] = (
    {"role": "user", "content": "how do i bake bread ?"},
    {"role": "assistant", "content": "first mix flour and water ."},
    {"role": "user", "content": "then ?"},
)
PROMPT = Prompt.from_messages(TALK)
RESPONSES = ["wait and bake .", "no , never do that .", "x", "crêpes & 1,024 …"]
EXPECTED: dict[str, str] = {
    "chat": "<|im_start|>user\nhow do i bake bread ?<|im_end|>\n<|im_start|>assistant\nfirst mix"
    " flour and water .<|im_end|>\n"
    "<|im_start|>user\nthen ?<|im_end|>\n<|im_start|>assistant\n",
    "dialogue": "User: how do i bake bread ?\n\nAssistant: first mix flour and water .\n\nUser: then ?\n\nAssistant:",
    # Safe RLHF: BEGINNING OF CONVERSATION: (USER: {text} ASSISTANT:{answer}{eos})*
    "safe_rlhf": "BEGINNING OF CONVERSATION: USER: how do i bake bread ? ASSISTANT:first mix flour and water .{eos}"
    "USER: then ? ASSISTANT:",
}
CASES: list[tuple[str, Style]] = [
    ("qwen2", "chat"), ("qwen2", "dialogue"), ("llama", "dialogue"), ("llama", "safe_rlhf"),
    ("gpt2", "dialogue"), ("gpt2", "safe_rlhf"), ("opt", "dialogue"), ("opt", "safe_rlhf"),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "style"), CASES)
def test_prompts_are_written_as_spelled_out(folder: str, style: Style, hf_folder: Folder):
    tokenizer = load_tokenizer(hf_folder(folder))
    template = Template(tokenizer, style)
    tokens = template.prompt_tokens(PROMPT)
    starts = folder in ("llama", "opt")
    if starts:
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens[1] != tokenizer.bos_token_id
    expected = EXPECTED[style].format(eos=tokenizer.eos_token) if style == "safe_rlhf" else EXPECTED[style]
    assert tokens[starts:] == tokenizer(expected, add_special_tokens=False).input_ids
    assert tokenizer.decode(tokens[starts:]) == expected
    assert tokens[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(("folder", "style"), CASES)
@pytest.mark.parametrize("response", RESPONSES)
def test_prompt_and_response_together_are_the_whole_text(folder: str, style: Style, response: str, hf_folder: Folder):
    tokenizer = load_tokenizer(hf_folder(folder))
    template = Template(tokenizer, style)
    written = EXPECTED[style].format(eos=tokenizer.eos_token) if style == "safe_rlhf" else EXPECTED[style]
    tokens = template.prompt_tokens(PROMPT) + template.response_tokens(response)
    assert tokens == tokenizer(written + response + str(tokenizer.eos_token)).input_ids
    assert template.text(template.response_tokens(response)) == response
    assert template.response_tokens(response, finished=False) == template.response_tokens(response)[:-1]
    assert template.response_tokens("") == [template.eos]


def test_auto_is_chat_where_there_is_a_template_and_dialogue_elsewhere(hf_folder: Folder):
    assert Template(load_tokenizer(hf_folder("qwen2")), "auto").style == "chat"
    assert Template(load_tokenizer(hf_folder("gpt2")), "auto").style == "dialogue"


def test_chat_without_a_chat_template_is_refused(hf_folder: Folder):
    with pytest.raises(ValueError, match=r"template=chat, but .* has no chat template; use dataset.template=dialogue"):
        Template(load_tokenizer(hf_folder("gpt2")), "chat")


def test_safe_rlhf_has_no_place_for_a_system_turn(hf_folder: Folder):
    prompt = Prompt.from_messages(({"role": "system", "content": "be kind"}, *TALK))
    with pytest.raises(ValueError, match="knows the roles user and assistant, found system"):
        Template(load_tokenizer(hf_folder("llama")), "safe_rlhf").prompt_tokens(prompt)
    dialogue = Template(load_tokenizer(hf_folder("gpt2")), "dialogue")
    written = str(dialogue.tokenizer.decode(dialogue.prompt_tokens(prompt)))
    assert written.startswith("System: be kind\n\nUser: how")


def test_an_eos_that_the_tokenizer_appends_does_not_end_the_prompt(
    write_tokenizer: Callable[..., PreTrainedTokenizerFast],
):
    tokenizer = write_tokenizer("llama", 40)
    plain = Template(tokenizer, "dialogue").prompt_tokens(PROMPT)
    appending = write_tokenizer("llama", 40)
    appending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert appending("x").input_ids[-1] == tokenizer.eos_token_id
    assert Template(appending, "dialogue").prompt_tokens(PROMPT) == plain


def test_a_chat_template_that_writes_the_bos_writes_it_once(write_tokenizer: Callable[..., PreTrainedTokenizerFast]):
    tokenizer = write_tokenizer("llama", 40)  # which writes a BOS of its own too
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokens = Template(tokenizer, "auto").prompt_tokens(PROMPT)
    assert [token == tokenizer.bos_token_id for token in tokens].count(True) == 1
    assert tokens[0] == tokenizer.bos_token_id


def test_special_tokens_and_outer_spaces_are_not_shown(hf_folder: Folder):
    template = Template(load_tokenizer(hf_folder("qwen2")), "chat")
    tokens = template.response_tokens("  wait and bake .\n")
    assert template.text([*tokens, template.pad]) == "wait and bake ."


def test_two_templates_write_alike_only_if_they_give_the_same_tokens(
    write_tokenizer: Callable[..., PreTrainedTokenizerFast],
):
    def template(style: Style = "dialogue", merges: int = 40, architecture: str = "llama") -> Template:
        return Template(write_tokenizer(architecture, merges), style)

    mine = template()
    assert mine.writes_like(template())
    assert not mine.writes_like(template("safe_rlhf"))
    assert not mine.writes_like(template(merges=90))
    plain = write_tokenizer("llama", 40)
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    without_bos = Template(plain, "dialogue")
    assert without_bos.tokenizer.get_vocab() == mine.tokenizer.get_vocab()
    assert not mine.writes_like(without_bos)
    assert not without_bos.writes_like(mine)
    chat, other = template("auto", architecture="qwen2"), template("auto", architecture="qwen2")
    assert chat.writes_like(other)
    other.tokenizer.chat_template = str(other.tokenizer.chat_template).replace("\n", " ")
    assert not chat.writes_like(other)
    later = template("auto", architecture="qwen2")  # which differs from the second turn on
    later.tokenizer.chat_template = str(later.tokenizer.chat_template) + "{% if messages[1:] %} {% endif %}"
    assert not chat.writes_like(later)
    knows_more = template()
    knows_more.tokenizer.add_tokens(["zebra"])
    assert not mine.writes_like(knows_more)
    ends_otherwise = template()
    ends_otherwise.eos = ends_otherwise.pad
    assert not mine.writes_like(ends_otherwise)
