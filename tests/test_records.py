from rlhf_lab.records import Message, Prompt

TALK: tuple[Message, ...] = (
    {"role": "user", "content": "how do i bake bread ?"},
    {"role": "assistant", "content": "mix the flour ."},
    {"role": "user", "content": "and then ?"},
)


def test_a_condition_follows_the_last_request_only():
    prompt = Prompt.from_messages(TALK).conditioned("<funny>", {"humour": 1.0})
    assert [message["content"] for message in prompt.spoken] == [
        "how do i bake bread ?",
        "mix the flour .",
        "and then ? <funny>",
    ]


def test_a_condition_is_no_part_of_the_request():
    plain = Prompt.from_messages(TALK)
    prompt = plain.conditioned("<funny>", {"humour": 1.0})
    assert prompt.id == plain.id
    assert prompt.request == plain.request == "and then ?"
    assert prompt.plain == plain != prompt
    assert plain.spoken == plain.messages == TALK


def test_a_prompt_is_written_as_the_text_of_one_turn_or_as_all_its_messages():
    assert Prompt.from_text("hi").conditioned("<funny>", {}).written == "hi"
    assert Prompt.from_messages(TALK).written == list(TALK)
    system: Message = {"role": "system", "content": "be kind"}
    assert Prompt.from_messages([system, TALK[0]]).written == [system, TALK[0]]
