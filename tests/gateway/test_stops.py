"""Stop strings: nothing of one is shown, nothing else waits, and the cutting does not matter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.gateway.tokens.stops import StopMatcher


def run(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = []
    for part in parts:
        shown.append(matcher.step(part))
        if matcher.matched:
            break
    shown.append(matcher.flush())
    return "".join(shown), matcher.matched


@pytest.mark.parametrize(
    ("stops", "parts", "shown", "matched"),
    [
        (["END"], ["abc E", "N", "D def"], "abc ", "END"),
        (["END"], ["abc E", "N", "T"], "abc ENT", None),
        (["END"], ["abc EN"], "abc EN", None),
        (["\n\n"], ["a\n", "b\n", "\n", "c"], "a\nb", "\n\n"),
        (["aab"], ["aa", "ab"], "a", "aab"),
        (["abcd", "bc"], ["abcd"], "a", "bc"),
        (["bc", "abc"], ["xabc"], "x", "abc"),
        (["你好"], ["说你", "好吗"], "说", "你好"),
    ],
)
def test_examples(stops: list[str], parts: list[str], shown: str, matched: str | None) -> None:
    assert run(stops, parts) == (shown, matched)


def test_only_what_may_become_a_stop_string_waits() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.step("go on S") == "go on "
    assert matcher.step("T") == ""
    assert matcher.step("ART") == "START"
    assert matcher.flush() == ""


letters = st.text("ab", min_size=1, max_size=4)


@given(stops=st.lists(letters, min_size=1, max_size=3), text=st.text("ab", max_size=30))
def test_how_a_text_is_cut_makes_no_difference(stops: list[str], text: str) -> None:
    shown, matched = run(stops, list(text))
    assert run(stops, [text]) == (shown, matched)
    assert text.startswith(shown)
    if matched is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text[len(shown) :].startswith(matched)
        assert not any(stop in shown for stop in stops)
