"""Answers as they are written: streamed or whole, for completions and for chats."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tidegate.protocol.chunks import AnswerHead, ChunkWriter, SseParser, Tokens, WholeAnswer, usage_object

PROMPT = [1, 2, 3]
USAGE = usage_object(3, 4, 2)


def head(**changed: Any) -> AnswerHead:
    fields = {"chat": False, "return_token_ids": True, "include_usage": True}
    return AnswerHead("cmpl-1", 1700000000, "tiny", **fields | changed)


def pieces(chat: bool) -> list[Tokens]:
    def logprobs(text: str) -> dict[str, Any]:
        if chat:
            return {"content": [{"token": text, "logprob": -1.0, "bytes": [], "top_logprobs": []}]}
        return {"tokens": [text], "token_logprobs": [-1.0], "top_logprobs": [{}]}

    return [
        Tokens("The ", [7], logprobs("The "), prompt_token_ids=PROMPT),
        Tokens('"tide"\n', [8], logprobs('"tide"\n'), prompt_token_ids=PROMPT),
        Tokens("\u6f22", [9, 10], None, "stop", "end", PROMPT),
    ]


def events(data: bytes) -> list[dict[str, Any]]:
    *payloads, done = SseParser().feed(data)
    assert done == b"[DONE]"
    return [orjson.loads(payload) for payload in payloads]


def streamed(chat: bool) -> list[dict[str, Any]]:
    writer = ChunkWriter(head(chat=chat))
    said = b"".join(writer.piece(piece) for piece in pieces(chat))
    return events(said + writer.end(USAGE))


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_says_what_the_whole_answer_says(chat: bool) -> None:
    whole = WholeAnswer(head(chat=chat))
    for piece in pieces(chat):
        whole.tokens(piece)
    body = orjson.loads(whole.body(USAGE, PROMPT))
    chunks = streamed(chat)
    choices = [c["choices"][0] for c in chunks if c["choices"]]
    assert {(c["id"], c["created"], c["model"]) for c in [body, *chunks]} == {("cmpl-1", 1700000000, "tiny")}
    answer = body["choices"][0]
    text = answer["message"]["content"] if chat else answer["text"]
    assert text == 'The "tide"\n\u6f22'
    assert text == "".join(c["delta"].get("content", "") if chat else c["text"] for c in choices)
    assert [i for c in choices for i in c.get("token_ids", [])] == answer["token_ids"] == [7, 8, 9, 10]
    assert choices[-1]["finish_reason"] == answer["finish_reason"] == "stop"
    assert choices[-1]["stop_reason"] == answer["stop_reason"] == "end"
    for name in answer["logprobs"]:
        rows = [row for c in choices if c["logprobs"] for row in c["logprobs"][name]]
        assert rows == answer["logprobs"][name]
    assert body["usage"] == chunks[-1]["usage"] == USAGE
    assert all(c["usage"] is None for c in chunks[:-1])


def test_offsets_count_characters_from_the_start_of_the_answer() -> None:
    said = [c["choices"][0]["logprobs"] for c in streamed(chat=False) if c["choices"]]
    assert [logprobs and logprobs["text_offset"] for logprobs in said] == [[0], [4], None]


def test_the_prompts_ids_come_once_and_where_vllm_has_them() -> None:
    completion, chat = streamed(chat=False), streamed(chat=True)
    assert completion[0]["choices"][0]["prompt_token_ids"] == PROMPT
    assert chat[0]["prompt_token_ids"] == PROMPT
    assert chat[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert str([completion, chat]).count("prompt_token_ids") == 2
    bodies = [orjson.loads(WholeAnswer(head(chat=c)).body(USAGE, PROMPT)) for c in (False, True)]
    assert bodies[0]["choices"][0]["prompt_token_ids"] == bodies[1]["prompt_token_ids"] == PROMPT


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("usage", [False, True])
def test_a_plain_piece_differs_from_any_other_only_in_its_cost(chat: bool, ids: bool, usage: bool) -> None:
    writer = ChunkWriter(head(chat=chat, return_token_ids=ids, include_usage=usage))
    opening = writer.piece(Tokens("a", [1]))
    plain = writer.plain('x"y', [5])
    assert plain == writer.piece(Tokens('x"y', [5], prompt_token_ids=PROMPT))
    (written,) = events(plain + b"data: [DONE]\n\n")
    longer = writer.piece(Tokens('x"y', [5]), {"metrics": None})
    assert written | {"metrics": None} == events(longer + b"data: [DONE]\n\n")[0]
    assert ("usage" in written, "token_ids" in written["choices"][0]) == (usage, ids)
    assert opening.count(b"data: ") == (2 if chat else 1)


def test_tool_calls_in_pieces_become_one_message() -> None:
    def call(**function: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, "function": function}]}

    whole = WholeAnswer(head(chat=True, return_token_ids=False))
    whole.tokens(Tokens("", [1], delta={"tool_calls": [{"index": 0, "id": "c1", "type": "function"}]}))
    whole.tokens(Tokens("", [2], delta=call(name="tide", arguments='{"a"')))
    whole.tokens(Tokens("", [3], delta=call(arguments=": 1}"), finish_reason="tool_calls"))
    message = orjson.loads(whole.body(USAGE, None))["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "tide", "arguments": '{"a": 1}'},
        }
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_usage_so_far_is_in_every_chunk_of_its_choice(chat: bool) -> None:
    writer = ChunkWriter(head(chat=chat, usage_so_far=True), 2)
    said = writer.piece(Tokens("a", [1, 2], prompt_token_ids=PROMPT)) + writer.plain("b", [3])
    said += writer.piece(Tokens("", [4], finish_reason="stop", prompt_token_ids=PROMPT))
    *chunks, last = events(said + writer.end(USAGE))
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {2}
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 2, 3, 4][not chat :]
    assert last["usage"] == USAGE


def test_tokens_that_a_parser_keeps_have_no_event() -> None:
    writer = ChunkWriter(head(chat=True, return_token_ids=False))
    assert b'"role"' in writer.piece(Tokens("", [1]))
    assert writer.piece(Tokens("", [2])) == b""
    assert writer.piece(Tokens("", [3], delta={"tool_calls": [{"index": 0}]}))
    with_ids = ChunkWriter(head(chat=True))
    with_ids.piece(Tokens("", [1]))
    assert b'"token_ids":[2]' in with_ids.piece(Tokens("", [2]))
