"""Seams: an answer cut into legs anywhere is the answer of one leg, to the last byte and token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import NotRepeated
from tidegate.gateway.continuation import Continuation
from tidegate.protocol.chunks import Tokens
from tidegate.protocol.stop_strings import StopStrings

BYTES = [b"a", b"b", b"ab", b"ba", b" ", b"\xe6", b"\xbc", b"\xa2", b"\xf0\x9f", b"\x8c\x8a", b"\xc3\xa9"]
"""Tokens by id: letters alone and together, pieces of two characters, and one character that is whole."""
ids = st.lists(st.integers(0, len(BYTES) - 1), min_size=1, max_size=24)
stop_lists = st.lists(st.sampled_from(["ab", "aba", "b a", "漢", "a漢", "🌊b", "aab", "é"]), max_size=3)


@dataclass(frozen=True)
class Ends:
    """When an engine ends early: as vLLM's sampling parameters say it."""

    stops: tuple[str, ...] = ()
    min_tokens: int = 0


def spoken(token_ids: Sequence[int]) -> list[str]:
    """Return the text after each token, as vLLM's detokenizer has it: an unfinished end waits."""
    texts, raw, text = [], b"", ""
    for token in token_ids:
        raw += BYTES[token]
        decoded = raw.decode(errors="replace")
        text = text if decoded.endswith("\ufffd") else decoded
        texts.append(text)
    return texts


def stopped(token_ids: Sequence[int], ends: Ends) -> tuple[int, str, str | None]:
    """Look for stop strings in the whole text after each token: how many tokens there are then, the text
    up to the end of the one that ends first, and which one it is."""
    before = ""
    for count, text in enumerate(spoken(token_ids), 1):
        found = [
            (begin + len(stop), order, stop)
            for order, stop in enumerate(ends.stops)
            for begin in range(len(text))
            if text.startswith(stop, begin) and begin + len(stop) > len(before)
        ]
        if found and count > ends.min_tokens:
            end, _, stop = min(found)
            return count, text[:end], stop
        before = text
    return len(token_ids), before, None


def leg(token_ids: Sequence[int], ends: Ends, sizes: Iterator[int]) -> Iterator[tuple[str, list[int], bool]]:
    """Yield what an engine says of the tokens, so many at a time, and whether it ends with that."""
    count, told, stop = stopped(token_ids, ends)
    texts = [*spoken(token_ids)[: count - 1], told]
    at, said = 0, ""
    while at < count:
        upto = min(count, at + next(sizes))
        yield texts[upto - 1][len(said) :], list(token_ids[at:upto]), upto == count and stop is not None
        at, said = upto, texts[upto - 1]


def through_legs(
    token_ids: Sequence[int], ends: Ends, *, include: bool, cuts: Sequence[int], sizes: Iterator[int]
) -> tuple[list[int], str, str | None]:
    """Return ids, text and stop string of an answer whose legs say so many pieces before they are cut."""
    out: list[int] = []
    stops = StopStrings(ends.stops, include=include) if ends.stops else None
    seams = Continuation(out, stops)
    answer = ""
    for most in [*cuts, len(token_ids) + 1]:
        base = seams.clean
        seams.begin(base)
        rest = Ends(ends.stops, max(0, ends.min_tokens - base))
        for text, new_ids, ended in [
            piece for piece, _ in zip(leg(token_ids[base:], rest, sizes), range(most), strict=False)
        ]:
            text, new_ids = seams.plain(text, new_ids)
            out += new_ids
            said = stopped(token_ids[base:], rest)[2] if ended else None
            answer += text if stops is None else seams.until_stop(text, said)
            if stops is not None and stops.found is not None:
                return out, answer, stops.found
        if len(out) == len(token_ids):
            break
    return out, answer + (stops.flush() if stops is not None else ""), None


@given(ids, stop_lists, st.integers(0, 6), st.booleans(), st.lists(st.integers(0, 9), max_size=6), st.data())
def test_an_answer_cut_anywhere_is_that_of_one_leg(
    token_ids: list[int], stops: list[str], least: int, include: bool, cuts: list[int], data: st.DataObject
) -> None:
    ends = Ends(tuple(dict.fromkeys(stops)), least)
    count, text, stop = stopped(token_ids, ends)
    if stop is not None and not include:
        text = text[: len(text) - len(stop)]
    sizes = iter(lambda: data.draw(st.sampled_from([1, 1, 1, 2, 4])), None)
    answer = through_legs(token_ids, ends, include=include, cuts=cuts, sizes=sizes)
    assert answer == (token_ids[:count], text, stop)


@given(ids, stop_lists.filter(bool), st.integers(0, 6), st.booleans())
def test_stop_strings_that_no_engine_is_given_are_found_as_vllm_finds_them(
    token_ids: list[int], strings: list[str], least: int, include: bool
) -> None:
    ends = Ends(tuple(dict.fromkeys(strings)), least)
    stops = StopStrings(ends.stops, include=include)
    count, text, stop = stopped(token_ids, ends)
    if stop is not None and not include:
        text = text[: len(text) - len(stop)]
    answer, before = "", ""
    for tokens, after in enumerate(spoken(token_ids), 1):
        answer += stops.feed(after[len(before) :], search=tokens > least)
        before = after
        if stops.found is not None:
            break
    assert (stops.found, answer + stops.flush()) == (stop, text)
    assert stop is None or tokens == count


def test_stop_strings_hold_back_no_more_than_may_begin_one() -> None:
    stops = StopStrings(("never", "end."))
    assert [stops.feed(text, search=True) for text in ["the e", "nd o", "f n", "e"]] == [
        "the ",
        "end o",
        "f ",
        "",
    ]
    assert stops.pending and stops.flush() == "ne"


def said(token_ids: list[int], text: str) -> Continuation:
    """Return the seams behind pieces of one token and one character each."""
    out: list[int] = []
    seams = Continuation(out, None)
    for token, character in zip(token_ids, text, strict=True):
        seams.plain(character, [token])
        out.append(token)
    return seams


def test_a_leg_that_says_something_else_than_before_is_no_continuation() -> None:
    for token_ids, text in ([7, 9], "cd"), ([7, 8], "xd"):
        seams = said([5, 7, 8], "bcd")
        seams.begin(1)
        with pytest.raises(NotRepeated):
            seams.plain(text, token_ids)


def test_a_leg_that_ends_before_it_has_repeated_all_is_no_continuation() -> None:
    seams = said([5, 7, 8], "bcd")
    seams.begin(1)
    with pytest.raises(NotRepeated):
        seams.piece(Tokens("c", [7], finish_reason="stop"), whole=False)


def test_of_tokens_said_again_only_the_new_ones_have_logprobs() -> None:
    seams = said([5, 7, 8], "bcd")
    seams.begin(1)
    piece = seams.piece(Tokens("cdef", [7, 8, 9, 10], {"tokens": ["c", "d", "e", "f"]}), whole=False)
    assert (piece.text, piece.token_ids, piece.logprobs) == ("ef", [9, 10], {"tokens": ["e", "f"]})
