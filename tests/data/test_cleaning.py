"""Generated responses are cut at markers and left out for a reason, and otherwise left as they are."""

import pytest

from rlhf_lab.data.cleaning import Cleaning

RELEASED = Cleaning(
    cut_at=["\n\nHuman:", "\n\nAssistant:"],
    drop_if={"dots": r"\.{5}", "smileys": r"(:\).*){3}"},
    unfinished=False,
)


@pytest.mark.parametrize(
    ("response", "finished", "kept", "reason"),
    [
        ("mix the cats", True, "mix the cats", ""),
        ("  Paris \n", True, "Paris", ""),
        ("no.\n\nHuman: and now?\n\nAssistant: yes", False, "no.", ""),
        ("\n\nHuman: hello", True, "", "empty"),
        ("   ", True, "", "empty"),
        ("well ....", True, "well ....", ""),
        ("well .....", True, "well .....", "dots"),
        ("a :) b :)", True, "a :) b :)", ""),
        ("a :)\nb :) c :)", True, "a :)\nb :) c :)", "smileys"),
        ("mix the", False, "mix the", "unfinished"),
    ],
)
def test_what_is_kept_and_why_not(response, finished, kept, reason):
    assert RELEASED(response, finished) == (kept, reason)


def test_unfinished_responses_are_kept_if_asked():
    assert Cleaning([], {}, unfinished=True)("mix the", False) == ("mix the", "")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"cleaning\.drop_if\.dots='\*' is no regular expression"):
        Cleaning([], {"dots": "*"}, unfinished=True)
    with pytest.raises(ValueError, match="empty marker"):
        Cleaning([""], {}, unfinished=True)
