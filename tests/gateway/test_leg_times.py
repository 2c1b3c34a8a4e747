"""What an engine tells of a leg is kept, in however many events it comes."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tidegate.engines.dialect import _StreamReader
from tidegate.engines.seam import Leg
from tidegate.protocol.chunks import Tokens

METRICS = {"kv_load_time_ms": 2.0, "kv_loaded_bytes": 4096, "cached_tokens": 8}
USAGE = {"prompt_tokens": 64, "prompt_tokens_details": {"cached_tokens": 64}}


class Sink:
    def tokens(self, tokens: Tokens) -> None: ...

    def plain(self, text: str, token_ids: list[int]) -> None: ...


@pytest.mark.parametrize(
    "tail", [[{"metrics": METRICS}, {"usage": USAGE}], [{"usage": USAGE, "metrics": METRICS}]]
)
def test_usage_behind_the_times_does_not_hide_them(tail: list[dict[str, Any]]) -> None:
    last = {"text": "a", "token_ids": [5], "finish_reason": "length", "logprobs": None}
    stream = _StreamReader(Leg("r", [1], None, 1, {}), Sink(), "i0")
    for event in [{"choices": [last]}, *({"choices": []} | more for more in tail)]:
        stream.feed(b"data: " + orjson.dumps(event) + b"\n\n")
    times = stream.end().times
    assert (times.kv_load_s, times.kv_loaded_bytes, times.cached_tokens) == (0.002, 4096, 8)
