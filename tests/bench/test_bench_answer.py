"""Folding streamed chunks into times."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidegate.bench.answer import BrokenAnswer, TimedAnswer


def completion(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def delta(finish: str | None = None, **content: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish}]}


def fold(*chunks: tuple[float, dict[str, Any]], chat: bool = False) -> TimedAnswer:
    answer = TimedAnswer(chat=chat)
    for at_s, chunk in chunks:
        answer.take(json.dumps(chunk).encode(), at_s)
    answer.take(b"[DONE]", 99.0)
    answer.close()
    return answer


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


def test_tpot_divides_by_the_servers_token_count() -> None:
    answer = fold(
        (1.0, completion("a")), (1.2, completion("bc")), (3.0, completion("d", "length")), (4.0, USAGE)
    )
    assert (answer.first_s, answer.last_s, answer.output_tokens, answer.prompt_tokens) == (1.0, 3.0, 5, 7)
    assert answer.tpot_s == pytest.approx(2.0 / 4)
    assert list(answer.gaps_s) == pytest.approx([0.2, 1.8])


def test_the_tokens_of_one_event_share_its_gap_where_it_says_how_many() -> None:
    """Four tokens every 80 ms are one every 20 ms."""

    def told(at_s: float, total: int, finish: str | None = None) -> tuple[float, dict[str, Any]]:
        usage = {"prompt_tokens": 7, "completion_tokens": total}
        return at_s, {**completion("abcd", finish), "usage": usage}

    by_usage = fold(told(1.0, 4), told(1.08, 8), told(1.16, 12, "length"))
    choice = {"index": 0, "text": "abcd", "finish_reason": None, "token_ids": [1, 2, 3, 4]}
    by_ids = fold(*((at_s, {"choices": [choice]}) for at_s in (1.0, 1.08)), told(1.16, 12, "length"))
    assert list(by_usage.gaps_s) == pytest.approx([0.02] * 8)
    assert (by_usage.chunks, by_usage.output_tokens) == (12, 12)
    assert list(by_ids.gaps_s)[:4] == pytest.approx([0.02] * 4)


def test_usage_of_the_whole_answer_in_its_last_event_is_not_that_events() -> None:
    last = {**completion("c", "length"), "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    answer = fold((1.0, completion("a")), (1.2, completion("b")), (1.4, last))
    assert list(answer.gaps_s) == pytest.approx([0.2, 0.2])


def test_without_usage_chunks_are_counted() -> None:
    answer = fold(
        (1.0, completion("a")), (1.5, completion("")), (2.0, completion("b")), (2.0, completion("", "stop"))
    )
    assert answer.output_tokens == 3
    assert answer.tpot_s == pytest.approx(0.5)


def test_one_token_has_no_tpot() -> None:
    assert fold((1.0, completion("a", "length"))).tpot_s is None


def test_an_empty_closing_chunk_is_the_end_token_when_the_server_counts_it() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}
    answer = fold((1.0, completion("a")), (2.0, completion("b")), (3.0, completion("", "stop")), (3.0, usage))
    assert answer.tpot_s == pytest.approx(1.0)


def test_a_role_chunk_is_no_token() -> None:
    answer = fold(
        (0.1, delta(role="assistant", content="")), (1.0, delta(content="x")), (2.0, delta("stop")), chat=True
    )
    assert answer.first_s == 1.0


def test_reasoning_counts_as_output() -> None:
    answer = fold((1.0, delta(reasoning_content="hm")), (2.0, delta("stop", content="x")), chat=True)
    assert (answer.first_s, answer.output_tokens) == (1.0, 2)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b'{"error": {"message": "out of memory", "code": 500}}', "out of memory"),
        (b'{"error": "plain"}', "plain"),
        (b'{"choices": [', "not a completion chunk"),
        (b'["a"]', "not a completion chunk"),
        (b'{"choices": [3]}', "not a completion chunk"),
    ],
)
def test_errors_and_garbage_break_the_answer(payload: bytes, words: str) -> None:
    with pytest.raises(BrokenAnswer, match=words):
        TimedAnswer(chat=False).take(payload, 1.0)


def test_an_answer_without_token_or_end_is_broken() -> None:
    with pytest.raises(BrokenAnswer, match="finish_reason"):
        fold((1.0, completion("a")))
    with pytest.raises(BrokenAnswer, match="no token"):
        fold((1.0, completion("", "abort")))
