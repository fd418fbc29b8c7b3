"""TinyHelp: the embedded task. Requests, demonstrations, a tokenizer and gold scores, all from a seed, no download.

A user names a goal and some items; a response is a few steps, one per item, with the right verb, in the right order.
Some items are hazardous and some goals harmful, so help and safety truly conflict; a joke serves a third taste. Because
the gold scores are formulas, it can show what real data cannot: over-optimisation of a learnt reward against the truth,
whether a cost constraint holds in truth, trade-offs of several rewards, and what is lost under shifts known exactly.

It cannot show anything about language: three hundred words, a grammar without paraphrase, annotators whose only fault
is the noise that one adds, and gold weights that we chose so that models of a hundred thousand parameters can learn
them. A ranking of methods found here is a hypothesis about real models, not evidence on them.
"""

import difflib
import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from rlhf_lab.data.tiny_help_gold import Request, cost, helpfulness, humour, parse_request
from rlhf_lab.data.tiny_help_world import (
    CAUTION,
    CLOSERS,
    HELD_OUT,
    IN_DISTRIBUTION,
    ITEMS,
    JOKE,
    OPENERS,
    ORDINALS,
    QUALITIES,
    RECKLESS,
    REDIRECT,
    REFUSAL,
    SAFETY,
    TEMPLATES,
    UNSEEN_TEMPLATES,
    Domain,
    list_items,
    vocabulary,
)
from rlhf_lab.records import Demonstration, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["SPLITS", "build_tokenizer", "cost", "demonstrations", "helpfulness", "humour", "sample_prompts"]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '' if loop.first else ' ' -}}{{- 'user : ' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' bot : ' + message['content'] + eos_token -}}
{%- else -%}
{{- raise_exception("TinyHelp knows the roles user and assistant, not " + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' bot :' -}}{%- endif -%}"""

NUM_BUCKETS = 6
# a split holds 65,000 requests or more (safety a third of that), but the shares of its kinds are kept only up to here
LARGEST_SAMPLE, LARGEST_SAFETY_SAMPLE = 50_000, 10_000
SFT_TEST_BUCKET, SAFETY_BUCKET = 4, 6

Kind = Literal["harmful", "hazardous", "benign"]
KINDS: tuple[Kind, ...] = ("harmful", "hazardous", "benign")
KIND_SHARES = (0.15, 0.45, 0.40)
HAZARDS_ASKED: dict[Kind, tuple[int, ...]] = {"harmful": (0, 1), "hazardous": (1, 2), "benign": (0,)}

# The demonstrator's habits. Those of its quality q, uniform on (0, 1), are in `_demonstrate`.
REFUSES: dict[Kind, float] = {"harmful": 0.40, "hazardous": 0.12, "benign": 0.03}
REDIRECTS = 0.5  # of refusals
OPENS, CLOSES = 0.50, 0.45
IS_RECKLESS = 0.18  # per step
CAUTIONS_HAZARD, CAUTIONS_SAFE = 0.30, 0.08  # per step
ADVISES_HAZARD, ADVISES_SAFE = 0.25, 0.08  # with and without a hazardous item among the steps
JOKES, JOKES_ON_TOPIC = 0.15, 0.6  # on an asked item, given a joke; otherwise on any item of the domain


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where a split's requests come from. `bucket` is None where domain, template or length alone keeps it apart."""

    domains: tuple[Domain, ...]
    templates: tuple[str, ...]
    num_items: tuple[int, ...]
    bucket: int | None
    largest: int = LARGEST_SAMPLE


def _in_distribution(bucket: int, largest: int = LARGEST_SAMPLE) -> Split:
    return Split(domains=IN_DISTRIBUTION, templates=TEMPLATES, num_items=(2, 3), bucket=bucket, largest=largest)


# The in-distribution splits partition the requests by a hash of their text, so no seed can make them meet.
SPLITS = {
    "sft": _in_distribution(0),
    "preferences": _in_distribution(1),
    "train": _in_distribution(2),
    "test": _in_distribution(3),
    "sft_test": _in_distribution(SFT_TEST_BUCKET),
    "preferences_test": _in_distribution(5),
    "safety": _in_distribution(SAFETY_BUCKET, LARGEST_SAFETY_SAMPLE),
    "ood_domain": Split(domains=HELD_OUT, templates=TEMPLATES, num_items=(2, 3), bucket=None),
    "ood_template": Split(domains=IN_DISTRIBUTION, templates=UNSEEN_TEMPLATES, num_items=(2, 3), bucket=None),
    "ood_items": Split(domains=IN_DISTRIBUTION, templates=TEMPLATES, num_items=(4, 5), bucket=None),
}


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A word-level tokenizer of the world's vocabulary; padding is on the left, and decoding inverts encoding exactly.

    The chat template reads "user : {content} bot :", then " {content}<eos>" for the response. No token is added outside
    it: `<bos>` is there for those who need a start.
    """
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), *vocabulary()]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=special["unk_token"]))
    backend.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        **special,
    )


def _known(split: str) -> None:
    if split not in SPLITS:
        close = difflib.get_close_matches(split, SPLITS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"TinyHelp has no split {split!r}, only {', '.join(SPLITS)}{hint}")


def sample_prompts(split: str, count: int, seed: int) -> list[Prompt]:
    """Draw different requests: 15% with a harmful goal, 45% benign with hazardous items, 40% wholly benign.

    Args:
        split: a key of `SPLITS`. `sft`, `preferences`, `train`, `test`, `sft_test`, `preferences_test` and `safety`
            share their domains and templates but no request, whatever the seeds. `ood_domain`, `ood_template` and
            `ood_items` (4 or 5 items instead of 2 or 3) each leave that distribution along one axis.
        count: how many, at most 50,000 (10,000 of `safety`). A smaller count draws the beginning of the same list. Half
            of the requests name the smaller number of items, until these run out: of 12,000 in distribution 36% name
            two.
        seed: the same on every machine. Two seeds of one split may share requests.

    Raises:
        ValueError: there is no such split, or the count is out of range.
    """
    _known(split)
    largest = SPLITS[split].largest
    if not 1 <= count <= largest:
        raise ValueError(f"count is {count}; the split {split} of TinyHelp gives 1 to {largest} different prompts")
    rng = random.Random(f"prompts {split} {seed}")
    drawn: dict[str, None] = {}  # a set that keeps the order
    while len(drawn) < count:
        [kind] = rng.choices(KINDS, KIND_SHARES)
        text = _draw_request(rng, SPLITS[split], kind)
        while text in drawn:  # the kind is kept, or the small kinds would thin out
            text = _draw_request(rng, SPLITS[split], kind)
        drawn[text] = None
    return [Prompt.from_text(text) for text in drawn]


def demonstrations(split: str, count: int, seed: int) -> list[Demonstration]:
    """Draw requests of a split, independently (so some repeat), and answer each as a writer of random quality.

    Args:
        split: a key of `SPLITS`; `sft`, and `sft_test` held out.
        count: how many, 1 or more. A smaller count draws the beginning of the same list.
        seed: the same on every machine.

    Raises:
        ValueError: there is no such split, or the count is below 1.
    """
    _known(split)
    if count < 1:
        raise ValueError(f"count is {count}; ask for 1 demonstration or more")
    rng = random.Random(f"demonstrations {split} {seed}")
    made = []
    for _ in range(count):
        [kind] = rng.choices(KINDS, KIND_SHARES)
        text = _draw_request(rng, SPLITS[split], kind)
        made.append(Demonstration(prompt=Prompt.from_text(text), response=_demonstrate(rng, parse_request(text), kind)))
    return made


def _draw_request(rng: random.Random, split: Split, kind: Kind) -> str:
    while True:
        domain = rng.choice(split.domains)
        num_hazards = rng.choice(HAZARDS_ASKED[kind])
        items = rng.sample(domain.hazardous, num_hazards)
        items += rng.sample(domain.safe, rng.choice(split.num_items) - num_hazards)
        rng.shuffle(items)
        goal = domain.harmful_goal if kind == "harmful" else rng.choice(domain.goals)
        text = rng.choice(split.templates).format(goal=goal, items=list_items(tuple(item.name for item in items)))
        if split.bucket is None or _bucket(text) == split.bucket:
            return text


def _bucket(text: str) -> int:
    digest = hashlib.sha256(text.encode()).digest()
    bucket = digest[0] % NUM_BUCKETS
    # a quarter of one bucket, and not a seventh of all, so that the requests of the other splits stay what they were
    return SAFETY_BUCKET if bucket == SFT_TEST_BUCKET and digest[1] % 4 == 0 else bucket


def _demonstrate(rng: random.Random, request: Request, kind: Kind) -> str:
    quality = rng.random()
    if rng.random() < REFUSES[kind]:
        return f"{REFUSAL} {REDIRECT}" if rng.random() < REDIRECTS else REFUSAL
    names = _choose_items(rng, request, quality)
    sentences = [rng.choice(OPENERS)] if rng.random() < OPENS else []
    sentences += [_write_step(rng, request.domain, names, place, quality) for place in range(len(names))]
    uses_hazard = any(ITEMS[name].hazardous for name in names)
    if rng.random() < (ADVISES_HAZARD if uses_hazard else ADVISES_SAFE):
        sentences.append(rng.choice(SAFETY))
    if rng.random() < JOKES:
        on_topic = rng.random() < JOKES_ON_TOPIC
        item = rng.choice(request.items) if on_topic else rng.choice(request.domain.items).name
        sentences.append(JOKE.format(item=item, quality=rng.choice(QUALITIES)))
    if rng.random() < CLOSES:
        sentences.append(rng.choice(CLOSERS))
    return " ".join(sentences)


def _choose_items(rng: random.Random, request: Request, quality: float) -> list[str]:
    names = [name for name in request.items if rng.random() < 0.55 + 0.4 * quality]
    names = names or [rng.choice(request.items)]  # an answer without a step would be no demonstration
    if rng.random() < 0.5 * (1 - quality):
        rng.shuffle(names)
    if rng.random() < 0.05 + 0.45 * (1 - quality):
        unasked = [item.name for item in request.domain.items if item.name not in request.items]
        names.insert(rng.randint(0, len(names)), rng.choice(unasked))
    if rng.random() < 0.3 * (1 - quality):
        names.insert(rng.randint(0, len(names)), rng.choice(names))
    return names


def _write_step(rng: random.Random, domain: Domain, names: list[str], place: int, quality: float) -> str:
    item = ITEMS[names[place]]
    verb = rng.choice(item.verbs if rng.random() < 0.35 + 0.5 * quality else domain.verbs)
    if rng.random() < 0.5 + 0.4 * quality:
        fitting = "first" if place == 0 else "finally" if place == len(names) - 1 else rng.choice(("then", "next"))
    else:
        fitting = rng.choice(("", *ORDINALS))
    reckless = rng.choice(RECKLESS) if rng.random() < IS_RECKLESS else ""
    caution = rng.choice(CAUTION) if rng.random() < (CAUTIONS_HAZARD if item.hazardous else CAUTIONS_SAFE) else ""
    return " ".join(word for word in (fitting, reckless, verb, "the", item.name, caution, ".") if word)
