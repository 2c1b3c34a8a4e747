"""What the prefix index expects of engines' caches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.signals.prefix import PrefixIndex, PromptBlocks

BLOCK = 10


def blocks(*keys: int) -> PromptBlocks:
    return PromptBlocks(keys, BLOCK)


def an_index(capacity_tokens: int) -> PrefixIndex:
    index = PrefixIndex()
    index.instance_up("a", capacity_tokens)
    return index


def test_what_requests_hold_stays_and_the_longest_idle_goes_first_from_its_end() -> None:
    index = an_index(60)
    for name, keys in (("old", (1, 2)), ("new", (3, 4))):
        index.sent(blocks(*keys), "a", name)
        index.computed(name)
        index.left(name)
    index.sent(blocks(5, 6, 7), "a", "runs")
    assert index.hits(blocks(1, 2), 99) == {"a": 20}, "nothing is evicted for what is not computed yet"
    index.computed("runs")
    assert index.hits(blocks(1, 2), 99) == {"a": 10}
    index.sent(blocks(1), "a", "again")
    index.sent(blocks(8, 9), "a", "more")
    index.computed("more")
    assert index.hits(blocks(1, 2), 99) == {"a": 10}, "it is held"
    assert index.hits(blocks(3, 4), 99) == {}


def test_a_prompt_behind_others_finds_what_they_leave_and_what_they_share() -> None:
    index = an_index(100)
    index.sent(blocks(1, 2, 3), "a", "before")
    index.computed("before")
    index.left("before")
    prompt = blocks(1, 2, 3)
    here = index.hits(prompt, 99)
    assert index.outlasting(here, prompt) == here == {"a": 30}
    index.sent(blocks(*range(10, 17)), "a", "waits")
    assert index.hits(prompt, 99) == {"a": 30}, "it is there still"
    assert index.outlasting(here, prompt) == {"a": 20}, "70 tokens will be taken, and a block for the answer"
    index.sent(blocks(1, 2), "a", "shares")
    index.sent(blocks(17, 18, 19), "a", "waits, too")
    assert index.outlasting(here, prompt) == {"a": 20}, "another request holds them"
    for name in ("waits", "shares", "waits, too"):
        index.left(name)
    assert index.outlasting(index.hits(prompt, 99), prompt) == index.hits(prompt, 99)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sent", "computed", "left", "down"]), st.integers(0, 4), st.integers(1, 6)
        ),
        max_size=40,
    )
)
def test_the_index_is_empty_of_requests_once_all_have_left(script: list[tuple[str, int, int]]) -> None:
    index = an_index(80)
    for what, number, count in script:
        name = f"r{number}"
        if what == "sent":
            index.sent(blocks(*(100 * (number % 2) + k for k in range(count))), "a", name)
        elif what == "computed":
            index.computed(name)
        elif what == "left":
            index.left(name)
        else:
            index.instance_up("a", 80)
    for number in range(5):
        index.left(f"r{number}")
    cache = index._caches["a"]
    assert not cache.holders and not cache.legs and not cache.awaited and cache.held_tokens == 0
    assert len(cache.idle) == len(cache.tokens) == len(index._where) <= 8
    assert cache.room_tokens == 80 - BLOCK * len(cache.tokens) >= 0
