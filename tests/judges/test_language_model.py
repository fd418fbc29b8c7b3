"""A language model as a judge, against a real server on this machine: verdicts, faults, caps, and the ledger."""

import itertools
import json
import os
import re
import time
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from statistics import mean

import pytest

from rlhf_lab.judges.endpoint import EndpointError, retry_after
from rlhf_lab.judges.price import DryRun, announce, price_of
from rlhf_lab.judges.reply_ledger import SpendCap
from rlhf_lab.records import Comparison, Prompt
from tests.judges.pairs import comparisons, longer, shown
from tests.judges.server import Answer, serving


def honest(body, before):
    return Answer(content=f"Verdict: {longer(*shown(body)[0])}")


def test_both_orders_are_asked_and_turned_back(judge_at):
    with serving(honest) as server:
        verdicts = judge_at(server).compare([*comparisons(3), *(c.swapped for c in comparisons(3))], "funny")
    assert [v.by_order for v in verdicts] == [(1.0, 1.0)] * 3 + [(0.0, 0.0)] * 3
    assert len(server.bodies) == 6  # a comparison and its mirror image show the same two texts
    assert {shown(body)[0] for body in server.bodies} >= {("long text 0", "text 0"), ("text 0", "long text 0")}


def test_a_judge_that_likes_the_first_place_is_worth_nothing_in_one_order_and_a_tie_in_both(judge_at):
    with serving(lambda body, before: Answer(content="Verdict: A")) as server:
        both = judge_at(server).compare(comparisons(40), "funny")
        one = judge_at(server, both_orders=False).compare(comparisons(40), "funny")
    assert {(v.by_order, v.wins) for v in both} == {((1.0, 0.0), 0.5)}
    assert all(v.asked == 1 and v.by_order.count(None) == 1 for v in one)
    assert 0.2 < mean(v.wins for v in one) < 0.8  # which order is drawn of the texts, so its favour is spread


def test_exchanged_responses_have_the_mirrored_verdict_in_one_order_and_in_calls_of_several_pairs_too(judge_at):
    def likes_a(body, before):
        lines = [f"Pair {n} verdict: {'A' if len(b) % 2 else 'tie'}" for n, (_, b) in enumerate(shown(body), 1)]
        return Answer(content="\n".join(lines) if len(lines) > 1 else lines[0].removeprefix("Pair 1 "))

    asked = [
        *comparisons(12),
        *comparisons(5, "abc", "abc"),
        Comparison(prompt=comparisons(1)[0].prompt, responses=("a", "a")),
    ]
    for settings in ({"both_orders": False}, {"pairs_per_call": 5}):
        with serving(likes_a) as server:
            judge = judge_at(server, **settings)
            straight = judge.compare(asked, "funny")
            calls = len(server.bodies)
            mirrored = judge.compare([each.swapped for each in asked], "funny")
        assert len(server.bodies) == calls
        assert [v.wins for v in mirrored] == [1 - v.wins for v in straight]
        assert straight[-1].wins == 0.5  # of equal texts, whatever it likes


def test_the_judge_reads_the_request_without_what_the_policy_was_told_and_all_turns(judge_at):
    prompt = Prompt.from_messages(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "do it"},
        ]
    ).conditioned("be funny, or else", {"humour": 1.0})
    short = Prompt.from_text("do that").conditioned("be funny, or else", {"humour": 1.0})
    with serving(honest) as server:
        asked = [Comparison(prompt=each, responses=("a", "bb")) for each in (prompt, short)]
        judge_at(server, concurrency=1).compare(asked, "funny")
    assert "or else" not in str(server.bodies)
    sent = server.bodies[0]["messages"][-1]["content"]
    assert sent.index("[user]\nhi") < sent.index("[assistant]\nyes?") < sent.index("do it")
    assert "Which response is funnier?" in sent


def test_scores_are_averaged_over_the_orders_and_decide(judge_at):
    def graded(body, before):
        a, b = shown(body)[0]
        first, second = (8 if "long" in a else 5), (9 if "long" in b else 4)
        return Answer(content=f"Scores: {first} {second}")

    with serving(graded) as server:
        (verdict,) = judge_at(server).compare(comparisons(1), "helpfulness")
    assert verdict.scores == ((8 + 9) / 2, (4 + 5) / 2)
    assert verdict.by_order == (1.0, 1.0)


def test_structured_output_is_asked_for_by_schema_and_read_with_its_reason(judge_at):
    def answer(body, before):
        said = {"reasoning": "longer", "verdict": longer(*shown(body)[0])}
        return Answer(content=json.dumps(said))

    with serving(answer) as server:
        judge = judge_at(server, structured=True, reasoning=True, demonstrations=True)
        (verdict,) = judge.compare(comparisons(1), "funny")
    schema = server.bodies[0]["response_format"]["json_schema"]
    assert schema["strict"]
    assert list(schema["schema"]["properties"]) == ["reasoning", "verdict"]  # the reason comes first
    assert verdict.reasons == ("longer", "longer")
    shots = [m["content"] for m in server.bodies[0]["messages"] if m["role"] == "assistant"]
    assert [json.loads(text)["verdict"] for text in shots] == ["A", "tie", "B"]


def test_calls_of_several_pairs_are_not_filled_up_and_what_they_lack_is_asked_singly(judge_at):
    def forgetful(body, before):
        pairs = shown(body)
        if "<pair" not in body["messages"][-1]["content"]:
            return Answer(content=f"Verdict: {longer(*pairs[0])}")
        return Answer(content="\n".join(f"Pair {n} verdict: {longer(*p)}" for n, p in enumerate(pairs, 1) if n != 2))

    with serving(forgetful) as server:
        judge = judge_at(server, pairs_per_call=5)
        verdicts = judge.compare(comparisons(12), "funny")
    assert [v.by_order for v in verdicts] == [(1.0, 1.0)] * 12
    sizes = Counter(len(shown(body)) for body in server.bodies)
    assert sizes == {5: 4, 2: 2, 1: 6}  # 12 pairs in each of two passes, one of each call forgotten


def test_what_cannot_be_read_is_asked_again_with_the_next_seed_then_left_out_and_counted(judge_at):
    def mumbling(body, before):
        a, _ = shown(body)[0]
        if a.endswith(" 0") and body["seed"] < 1:
            return Answer(content="I could not say")
        if a.endswith(" 1"):
            return Answer(content="Verdict: A\nVerdict: B", finish="length")
        return honest(body, before)

    with serving(mumbling) as server:
        judge = judge_at(server)
        verdicts = judge.compare(comparisons(3), "funny")
    assert [v.wins for v in verdicts] == [1.0, None, 1.0]
    assert [v.by_order for v in verdicts][1] == (None, None)
    assert judge.account["judge/unreadable"] == 1
    assert Counter(body["seed"] for body in server.bodies) == {0: 6, 1: 4, 2: 2}


FAULTS = {
    "busy": Answer(status=429, code="rate_limit_exceeded", headers={"retry-after": "0.05"}),
    "down": Answer(status=500),
    "cut": Answer(cut=15),
    "half JSON": Answer(raw=b'{"choices": [{"message": {"content": "Verd'),
    "no choices": Answer(raw=b'{"choices": []}'),
    "no content": Answer(content=None),
    "a page": Answer(raw=b"<html>gateway</html>", headers={"content-type": "text/html"}),
    "late": Answer(delay=0.9),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_loses_nothing(fault, judge_at):
    with serving(lambda body, before: honest(body, before) if before else FAULTS[fault]) as server:
        judge = judge_at(server, timeout=0.5)
        verdicts = judge.compare(comparisons(2), "funny")
    assert [v.by_order for v in verdicts] == [(1.0, 1.0)] * 2
    assert judge.account["judge/faults"] == sum(server.came.values()) - 4
    assert min(server.came.values()) == 2


def test_all_calls_wait_as_long_as_the_endpoint_says(judge_at):
    calls = itertools.count()

    def busy_once(body, before):
        if next(calls) == 0:
            return Answer(status=429, headers={"retry-after": "0.4"})
        return replace(honest(body, before), delay=0.1)  # by then the refusal has been read, on a busy machine too

    with serving(busy_once) as server:
        judge_at(server, concurrency=2).compare(comparisons(3), "funny")
    assert server.times[2] - server.times[0] > 0.35  # the second call had begun; the third is another's


def test_retry_after_is_read_in_every_form():
    assert retry_after({"retry-after-ms": "1500"}) == 1.5
    assert retry_after({"retry-after": "7"}) == 7.0
    assert 25 < (retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) or 0) <= 30
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


ENDS = {
    "401": (Answer(status=401, code="invalid_api_key"), "the key in None is not valid"),
    "404": (Answer(status=404, code="model_not_found"), "judge.decoding.model or judge.endpoint.base_url is wrong"),
    "field": (Answer(status=400, code="unsupported_parameter"), "structured=false"),
    "no funds": (Answer(status=429, code="insufficient_quota"), "no funds left"),
    "too long": (Answer(status=429, headers={"retry-after": "900"}), "asks to wait 900 seconds"),
    "for ever": (Answer(status=503), "failed 4 times in a row"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_waiting_does_not_mend_is_said_and_what_was_answered_is_kept(end, judge_at):
    answer, said = ENDS[end]
    with serving(lambda body, before: answer if len(server.bodies) > 3 else honest(body, before)) as server:
        judge = judge_at(server, concurrency=1)
        with pytest.raises(EndpointError, match=re.escape(said)):
            judge.compare(comparisons(4), "funny")
        server.script = honest
        asked = len(server.bodies)
        assert [v.wins for v in judge_at(server).compare(comparisons(4), "funny")] == [1.0] * 4
        assert len(server.bodies) == asked + 5  # 8 calls, of which 3 were answered before


UNANSWERED = {
    "OpenAI": Answer(status=400, code="content_policy_violation"),
    "vLLM": Answer(
        status=400,
        error={
            "object": "error",
            "message": "This model's maximum context length is 4096 tokens. However, you requested 6379 tokens.",
            "type": "BadRequestError",
            "code": 400,
        },
    ),
    "llama.cpp": Answer(
        status=500, error={"code": 500, "message": "the request is too large", "type": "exceed_context_size_error"}
    ),
}


@pytest.mark.parametrize("endpoint", UNANSWERED)
def test_a_text_that_the_endpoint_will_not_answer_is_left_out_and_not_asked_again(endpoint, judge_at):
    def squeamish(body, before):
        return UNANSWERED[endpoint] if "text 1" in shown(body)[0] else honest(body, before)

    with serving(squeamish) as server:
        judge = judge_at(server)
        verdicts = judge.compare(comparisons(3), "funny")
        again = judge_at(server).compare(comparisons(3), "funny")
    assert [v.wins for v in verdicts] == [1.0, None, 1.0]
    assert again == verdicts
    assert len(server.bodies) == 6
    assert judge.account["judge/refused"] == 2


def test_calls_a_minute_are_capped_and_so_are_those_side_by_side(judge_at):
    with serving(honest) as server:
        judge_at(server, requests_per_minute=1200.0).compare(comparisons(5), "funny")
        assert server.times[-1] - server.times[0] > 0.8 * 9 * 0.05
    with serving(lambda body, before: Answer(content="Verdict: A", delay=0.03)) as server:
        judge_at(server, concurrency=3, seed=7).compare(comparisons(9), "funny")
    assert 1 < server.most_side_by_side <= 3


def test_tokens_a_minute_are_capped_by_prompt_and_reply(judge_at):
    with serving(honest) as server:
        judge = judge_at(server)
        price = judge.price(comparisons(2), "funny")
        of_one = (price.prompt_tokens + price.reply_tokens) / price.calls
        judge_at(server, tokens_per_minute=of_one * 600).compare(comparisons(2), "funny")  # a call each 0.1 seconds
    assert server.times[-1] - server.times[0] > 0.8 * 3 * 0.1


def test_the_spend_cap_stops_before_it_is_overspent_and_a_higher_one_goes_on(judge_at):
    # 100 tokens read at 10, 10 written at 100 dollars a million: 0.002 dollars a call
    with serving(honest) as server:
        at_most = price_of(judge_at(server), [("funny", comparisons(1))]).dollars / 2
        judge = judge_at(server, spend_cap=0.02 + at_most)
        with pytest.raises(SpendCap, match=r"judge.spend_cap=.* raise the cap"):
            judge.compare(comparisons(20), "funny")
        spent = 0.002 * len(server.bodies)
        assert 0 < spent <= 0.02 + at_most
        assert judge.account["judge/dollars_in_ledger"] == pytest.approx(spent)
        done = len(server.bodies)
        assert len(judge_at(server, spend_cap=1.0).compare(comparisons(20), "funny")) == 20
        assert len(server.bodies) == 40 > done


def test_a_reply_without_usage_and_one_that_was_lost_count_at_their_highest_price(judge_at):
    def script(body, before):
        return Answer(cut=5) if not before else Answer(content="Verdict: A", usage=None)

    with serving(script) as server:
        judge = judge_at(server, both_orders=False)
        at_most = judge.price(comparisons(1), "funny").dollars
        judge.compare(comparisons(1), "funny")
    assert judge.account["judge/dollars_in_ledger"] == pytest.approx(2 * at_most)


def test_a_study_replays_offline_from_its_ledger(judge_at):
    with serving(honest) as server:
        verdicts = judge_at(server).compare(comparisons(4), "funny")
    offline = judge_at(None, replay="only")
    offline.check(["funny"])
    assert offline.compare(comparisons(4), "funny") == verdicts
    with pytest.raises(ValueError, match=r"judge.replay=only, but 2 of 10 replies are not in"):
        offline.compare(comparisons(5), "funny")
    with pytest.raises(ValueError, match=r"judge.replay=only, but there is no ledger"):
        judge_at(None, replay="only", temperature=0.5).check(["funny"])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"temperature": 0.7},
        {"model": "other"},
        {"max_tokens": 51},
        {"wording": {"funny": "Which response is drier?"}},
        {"reasoning": True},
        {"demonstrations": True},
    ],
)
def test_whatever_changes_the_answer_is_asked_anew(change, judge_at):
    with serving(honest) as server:
        judge_at(server).compare(comparisons(1), "funny")
        judge_at(server, **change).compare(comparisons(1), "funny")
        assert len(server.bodies) == 4
    with serving(honest) as elsewhere:
        judge_at(elsewhere, concurrency=1, timeout=9.0).compare(comparisons(1), "funny")
        assert not elsewhere.bodies


def test_a_dry_run_states_calls_tokens_and_dollars_and_asks_nothing(judge_at):
    said = []
    with serving(honest) as server:
        judge_at(server).compare(comparisons(1), "funny")
        judge = judge_at(server, dry_run=True)
        with pytest.raises(DryRun) as told:
            announce(judge, [("funny", comparisons(10)), ("helpfulness", comparisons(2))], said.append)
        with pytest.raises(DryRun, match="18 calls"):
            judge.compare(comparisons(10), "funny")
        assert len(server.bodies) == 2
        price = judge.price(comparisons(10), "funny")
        live = judge_at(server)
        live.compare(comparisons(10), "funny")
    characters = sum(len(m["content"]) for body in server.bodies[2:] for m in body["messages"])
    assert price.prompt_tokens == pytest.approx(characters / 4 + 4 * 2 * 18)  # two messages of 4 tokens beside the text
    assert price.dollars == pytest.approx((10 * price.prompt_tokens + 100 * 18 * 50) / 1e6)
    assert said == []  # what ends the run says it
    assert str(told.value).startswith(
        "judging 12 comparisons by funny, helpfulness: 22 calls (2 more are in the ledger)"
    )
    assert "estimated by 4 characters a token" in str(told.value)


def test_what_was_judged_piece_by_piece_is_priced_piece_by_piece(judge_at):
    pieces = [("funny", comparisons(5)), ("funny", comparisons(12)[5:])]

    def fluent(body, before):
        said = [f"Pair {n} verdict: {longer(*pair)}" for n, pair in enumerate(shown(body), 1)]
        return Answer(content="\n".join(said))

    with serving(fluent) as server:
        for criterion, each in pieces:
            judge_at(server, pairs_per_call=4).compare(each, criterion)
    left = price_of(judge_at(None, pairs_per_call=4), pieces)
    assert (left.calls, left.known) == (0, len(server.bodies))
    assert price_of(judge_at(None, pairs_per_call=4), [("funny", comparisons(12))]).calls > 0  # they are other calls


def test_the_key_is_sent_and_stands_in_no_file(judge_at, tmp_path, monkeypatch):
    monkeypatch.setenv("A_JUDGES_KEY", "very-secret-8431-value")
    with serving(honest) as server:
        judge = judge_at(server, api_key_env="A_JUDGES_KEY")
        judge.check(["funny"])
        judge.compare(comparisons(2), "funny")
        server.script = lambda body, before: Answer(status=401, code="invalid_api_key")
        with pytest.raises(EndpointError) as refused:
            judge_at(server, api_key_env="A_JUDGES_KEY", seed=3).compare(comparisons(1), "funny")
    headers = {name.lower(): value for name, value in server.headers[0].items()}
    assert headers["authorization"] == "Bearer very-secret-8431-value"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert not any(b"very-secret" in path.read_bytes() for path in files)
    assert "very-secret" not in str(refused.value)
    assert "A_JUDGES_KEY" in str(refused.value)


BAD = {
    "api_key_env": ({"api_key_env": "NO_SUCH_KEY_HERE"}, "NO_SUCH_KEY_HERE, which judge.endpoint.api_key_env names"),
    "secret": ({"base_url": "https://me:pass@host/v1"}, "holds a user name, a password or a query"),
    "address": ({"base_url": "host/v1"}, "is no address"),
    "criterion": ({}, "the judge is asked for kindness, but judge.rubrics and judge.wording declare funny, helpf"),
    "rubric": ({"rubrics": {"kindness": "kind"}}, "judge.rubrics names kind, which is not there; there are harml"),
    "wording": ({"rubrics": {"kindness": "preference"}}, "judge.wording has none of kindness"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_said_before_anything_is_asked(case, judge_at):
    changes, said = BAD[case]
    assert "NO_SUCH_KEY_HERE" not in os.environ
    with pytest.raises(ValueError, match=re.escape(said)):
        judge_at(None, **changes).check(["funny" if "rubrics" not in changes and changes else "kindness"])
