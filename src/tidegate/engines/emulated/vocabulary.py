"""The token ids of an emulated model (bytes, pairs of bytes, words) and the answers it makes of them.

Equal prompts have equal answers, wherever and in however many legs. Decoding what was encoded gives the same
bytes again. Ids that name nothing decode to no text, so that prompts of random ids, as load clients send
them, are accepted in the usual range.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np

from tidegate.workloads.prompts import WORDS, scrambled

VOCAB_SIZE = 128_256
"""That of Llama 3, the smallest vocabulary among the packaged models."""
FIRST_PAIR = 256
FIRST_WORD = FIRST_PAIR + 256 * 256
_PIECES = re.compile(b"|".join([*(b" %b(?![a-z])" % word.encode() for word in WORDS), b"[^ ]{1,2}| "]))
_WORD_IDS = {b" " + word.encode(): FIRST_WORD + index for index, word in enumerate(WORDS)}


@cache
def pieces() -> list[bytes]:
    """Return the bytes of every id."""
    singles = [bytes([byte]) for byte in range(256)]
    named = [*singles, *(a + b for a in singles for b in singles), *_WORD_IDS]
    return [*named, *[b""] * (VOCAB_SIZE - len(named))]


class Codec:
    """The PromptCodec of emulated instances."""

    longest_token_chars = 5

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of ``text``; there are no special tokens."""
        return [_id_of(piece) for piece in _PIECES.findall(text.encode("utf-8", "surrogatepass"))]

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of the messages, each after its role, and of the role that is to answer."""
        lines = [f"{message['role']}: {message.get('content', '')}\n" for message in messages]
        return self.encode("".join([*lines, *(["assistant:"] if add_generation_prompt else [])]))

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of ``token_ids``."""
        known = pieces()
        return b"".join([known[token_id] for token_id in token_ids]).decode("utf-8", "replace")


def _id_of(piece: bytes) -> int:
    if len(piece) > 2:
        return _WORD_IDS[piece]
    return piece[0] if len(piece) == 1 else FIRST_PAIR + piece[0] * 256 + piece[1]


def answer(prompt: Sequence[int], start: int, count: int) -> list[int]:
    """Return tokens ``start`` to ``start + count`` of the endless answer to ``prompt``."""
    digest = blake2b(np.asarray(prompt, dtype=np.uint32).tobytes(), digest_size=8).digest()
    draws = scrambled(int.from_bytes(digest, "little"), start, count)
    ids: list[int] = (draws % np.uint64(len(WORDS)) + np.uint64(FIRST_WORD)).tolist()
    return ids


def block_ids(tokens: Sequence[int], block_tokens: int, salt: str) -> tuple[int, ...]:
    """Return an id for every whole block of ``tokens``, which also stands for all tokens before it. Ids are
    comparable within a process only. Different salts share none."""
    raw = np.asarray(tokens, dtype=np.uint32).tobytes()
    size = 4 * block_tokens
    ids, known = [], hash(salt)
    for start in range(0, len(raw) - size + 1, size):
        known = hash((known, raw[start : start + size]))
        ids.append(known)
    return tuple(ids)
