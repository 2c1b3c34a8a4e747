"""Answers made up from their prompts: equal prompts have equal answers, wherever and in however many legs."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from tidegate.engines.emulated.vocabulary import FIRST_WORD
from tidegate.workloads.prompts import WORDS, scrambled


def answer(prompt: Sequence[int], start: int, count: int) -> list[int]:
    """Return tokens ``start`` to ``start + count`` of the endless answer to ``prompt``."""
    digest = blake2b(np.asarray(prompt, dtype=np.uint32).tobytes(), digest_size=8).digest()
    draws = scrambled(int.from_bytes(digest, "little"), start, count)
    ids: list[int] = (draws % np.uint64(len(WORDS)) + np.uint64(FIRST_WORD)).tolist()
    return ids


def block_ids(tokens: Sequence[int], block_tokens: int, salt: str) -> tuple[int, ...]:
    """Return an id for every whole block of ``tokens``, which also stands for all tokens before it.

    Ids are comparable within a process only. Different salts share none.
    """
    raw = np.asarray(tokens, dtype=np.uint32).tobytes()
    size = 4 * block_tokens
    ids, known = [], hash(salt)
    for start in range(0, len(raw) - size + 1, size):
        known = hash((known, raw[start : start + size]))
        ids.append(known)
    return tuple(ids)
