"""Many verdicts from a server that fails and is partial, by a process that is killed half way and started again.

As a module it is that process: `python -m tests.judges.campaign <server's address> <folder> <comparisons>`.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

from rlhf_lab.judges.endpoint import Decoding, Endpoint, Prices
from rlhf_lab.judges.language_model import LanguageModelJudge
from rlhf_lab.judges.reading import Format
from rlhf_lab.judges.reply_ledger import ReplyLedger, digest
from rlhf_lab.judges.rubric import Rubric
from rlhf_lab.records import Comparison, Prompt
from tests.judges.server import Answer, ScriptedServer, serving

FAULTS = 0.05  # share of calls that fail when they are first made, a fifth of them in each way
LIKES_FIRST = 0.2  # share of calls answered A whatever A is
BETTER = 0.7  # share of the comparisons whose first response is the better one
WORDS = "Which response is good?"
CONCURRENCY, TIMEOUT = 16, 3.0
ROOT = Path(__file__).resolve().parents[2]


def draw(*parts: object) -> float:
    """Uniform on [0, 1), a function of the parts."""
    return int(sha256("/".join(map(str, parts)).encode()).hexdigest()[:12], 16) / 16**12


def comparisons(count: int) -> list[Comparison]:
    """The first response is good and the second bad on a share BETTER of them, else the other way round."""
    return [
        Comparison(
            prompt=Prompt.from_text(f"request {i}"),
            responses=(f"good {i}", f"bad {i}") if draw("better", i) < BETTER else (f"bad {i}", f"good {i}"),
        )
        for i in range(count)
    ]


def opinion(body: dict[str, Any]) -> Answer:
    """What the judge thinks, the same each time it is asked."""
    shown = body["messages"][-1]["content"]
    says_a = draw("likes first", shown) < LIKES_FIRST or "<response_a>\ngood" in shown
    return Answer(content=f"Verdict: {'A' if says_a else 'B'}")


def failing(body: dict[str, Any], before: int) -> Answer:
    """Faults on first calls, drawn by content."""
    kind = int(draw("fault", body["messages"][-1]["content"]) / FAULTS * 5)
    if before or kind > 4:
        return opinion(body)
    return [
        Answer(status=500),
        Answer(status=429, headers={"retry-after": "0.05"}),
        Answer(cut=20),
        Answer(raw=b'{"choices": [{"mess'),
        Answer(content=opinion(body).content, delay=TIMEOUT + 1),
    ][kind]


def judge(address: str, folder: Path) -> LanguageModelJudge:
    return LanguageModelJudge(
        endpoint=Endpoint(
            base_url=address,
            api_key_env=None,
            concurrency=CONCURRENCY,
            timeout=TIMEOUT,
            tries=8,
            first_wait=0.05,
            longest_wait=5.0,
            requests_per_minute=None,
            tokens_per_minute=None,
        ),
        decoding=Decoding(
            model="partial",
            temperature=0.0,
            top_p=1.0,
            seed=0,
            max_tokens=20,
            limit_field="max_tokens",
            structured=False,
        ),
        prices=Prices(prompt=1.0, reply=1.0),
        rubrics={},
        wording={"good": WORDS},
        preference_rubric="preference",
        reasoning=False,
        demonstrations=False,
        pairs_per_call=1,
        both_orders=True,
        rereads=2,
        spend_cap=None,
        ledger=str(folder),
        replay="ask",
        dry_run=False,
        tokenizer=None,
    )


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Fields:
    verdicts, unread: how many came, and of how many an order cannot be read.
    wrong: verdicts of one order that are not what the server thinks.
    calls, faults: different calls, and how often one failed.
    lost: calls that the server never answered whole.
    interrupted: calls that the ledger says were in flight when the process was killed.
    sent_twice: calls that the server answered whole more than once; `unexplained`, those of them that were neither in
        flight nor timed out. `charged_twice`: by an endpoint that honours idempotency keys.
    first_order, both_orders, truth: how often the first response wins, by the first order alone, by both, and in truth.
    first_shown: how often the response wins that is shown first.
    seconds: from the first call to the last verdict, two starts of Python included.
    """

    verdicts: int
    unread: int
    wrong: int
    calls: int
    faults: int
    lost: int
    interrupted: int
    sent_twice: int
    unexplained: int
    charged_twice: int
    first_order: float
    both_orders: float
    truth: float
    first_shown: float
    seconds: float


class Till:
    """What an endpoint that honours idempotency keys would charge for, and what it sends whole, by key."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.charged: Counter[str] = Counter()
        self._made: set[str] = set()
        self._lock = threading.Lock()

    def script(self, body: dict[str, Any], before: int) -> Answer:
        answer, key = failing(body, before), digest(body, 0)
        with self._lock:
            self.sent[key] += answer.is_whole
            if answer.status == 200 and answer.raw is None and key not in self._made:
                self._made.add(key)
                self.charged[key] += 1
        return answer


def start(server: ScriptedServer, folder: Path, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.judges.campaign", server.url, str(folder), str(count)], cwd=ROOT
    )


def campaign(count: int, folder: Path) -> Findings:
    """Ask, kill when half of the calls are answered, ask again, and compare with what the server knows."""
    till = Till()
    with serving(till.script) as server:
        process = start(server, folder, count)
        while not server.answered:
            time.sleep(0.01)
        began = time.monotonic()
        while server.answered.total() < count:
            assert process.poll() is None, "the process ended before half of its calls were answered"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (path,) = folder.glob("*.jsonl")
        in_flight = ReplyLedger(path, {}, None).in_flight
        assert start(server, folder, count).wait() == 0
        seconds = time.monotonic() - began
    asked, said = comparisons(count), json.loads((folder / "verdicts.json").read_text())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    timed_out = {line["lost"] for line in lines if line.get("why") == "no reply in time"}
    doubled = {key for key, times in till.sent.items() if times > 1}
    return Findings(
        verdicts=len(said),
        unread=sum(None in by_order for by_order in said),
        wrong=sum(by_order != thought(pair) for pair, by_order in zip(asked, said, strict=True)),
        calls=len(till.sent),
        faults=sum("lost" in line for line in lines),
        lost=sum(times < 1 for times in till.sent.values()),
        interrupted=len(in_flight),
        sent_twice=len(doubled),
        unexplained=len(doubled - in_flight - timed_out),
        charged_twice=sum(times > 1 for times in till.charged.values()),
        first_order=mean(by_order[0] for by_order in said),
        both_orders=mean(sum(by_order) / 2 for by_order in said),
        truth=mean(pair.responses[0].startswith("good") for pair in asked),
        first_shown=mean((by_order[0] + 1 - by_order[1]) / 2 for by_order in said),
        seconds=seconds,
    )


def thought(pair: Comparison) -> list[float]:
    """The verdict that the server means, by order."""
    form = Format(structured=False, reasoning=False, batched=False)
    texts = [
        Rubric.read("preference").messages([shown], WORDS, form, False)[-1]["content"] for shown in (pair, pair.swapped)
    ]
    first, second = (str(opinion({"messages": [{"content": text}]}).content).endswith("A") for text in texts)
    return [float(first), 1.0 - second]


if __name__ == "__main__":
    address, where, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    verdicts = judge(address, where).compare(comparisons(number), "good")
    (where / "verdicts.json").write_text(json.dumps([verdict.by_order for verdict in verdicts]))
