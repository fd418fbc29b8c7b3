"""What is asked in these tests, and how a scripted judge sees it."""

import re

from rlhf_lab.records import Comparison, Prompt


def comparisons(count, first="long text", second="text"):
    """Comparisons of different requests; the second response is the shorter."""
    return [
        Comparison(prompt=Prompt.from_text(f"request {i}"), responses=(f"{first} {i}", f"{second} {i}"))
        for i in range(count)
    ]


def shown(body):
    """(response A, response B) of the pairs that a request shows, in its last message."""
    return re.findall(
        r"<response_a>\n(.*?)\n</response_a>\n\n<response_b>\n(.*?)\n</response_b>",
        body["messages"][-1]["content"],
        re.DOTALL,
    )


def longer(a, b):
    """A judge who favours the longer text, as a word."""
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
