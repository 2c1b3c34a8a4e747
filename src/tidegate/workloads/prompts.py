"""Prompts of a given length that share prefixes as a trace says, as token ids or as words.

Every unit (token or word) is a hash of (seed, what it belongs to, its position), so a prompt needs
no memory of earlier ones, and the same trace and seed give the same prompts everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from importlib import resources

import numpy as np
import numpy.typing as npt

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import TraceRecord

WORDS: tuple[str, ...] = tuple(
    (resources.files("tidegate.workloads") / "words.txt").read_text(encoding="utf-8").split()
)
"""Common four-letter words: one token each after a space in the usual BPE vocabularies, and five bytes each
for a byte-level one, so a prompt's token count hardly depends on which were drawn."""


@dataclass(frozen=True, slots=True)
class TokenPrompts:
    """Prompts as token ids in ``[low, vocab)``; raises ConfigError when the range is empty."""

    vocab: int
    low: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.vocab:
            raise ConfigError(f"token ids need 0 <= low < vocabulary, got {self.low} and {self.vocab}")

    def prompt(self, record: TraceRecord, index: int) -> list[int]:
        """Return exactly ``record.input_tokens`` ids; ``index`` makes a prompt without prefix unique."""
        return self._ids(_units(record, index, record.input_tokens, record.block_tokens, self.seed))

    def piece(self, name: str, tokens: int) -> list[int]:
        """Return ``tokens`` ids that belong to ``name`` alone."""
        return self._ids(scrambled(_key(self.seed, "piece", name), 0, tokens))

    def _ids(self, units: npt.NDArray[np.uint64]) -> list[int]:
        ids: list[int] = (units % np.uint64(self.vocab - self.low) + np.uint64(self.low)).tolist()
        return ids


@dataclass(frozen=True, slots=True)
class WordPrompts:
    """Prompts as text for an endpoint that counts ``overhead_tokens + words * tokens_per_word``."""

    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tokens_per_word > 0:
            raise ConfigError(f"tokens per word must be positive, got {self.tokens_per_word}")

    def prompt(self, record: TraceRecord, index: int) -> str:
        """Return text of about ``record.input_tokens`` tokens, at least one word."""
        words = max(1, round((record.input_tokens - self.overhead_tokens) / self.tokens_per_word))
        block_words = max(1, round(record.block_tokens / self.tokens_per_word))
        return _text(_units(record, index, words, block_words, self.seed))

    def piece(self, name: str, tokens: int) -> str:
        """Return text of about ``tokens`` tokens, at least one word, that belongs to ``name`` alone."""
        words = max(1, round(tokens / self.tokens_per_word))
        return _text(scrambled(_key(self.seed, "piece", name), 0, words))


def words(count: int) -> str:
    """Return ``count`` words, the kind of text that ``WordPrompts`` makes, to calibrate with."""
    return " ".join(WORDS[i % len(WORDS)] for i in range(count))


def _text(units: npt.NDArray[np.uint64]) -> str:
    return " ".join([WORDS[i] for i in (units % np.uint64(len(WORDS))).tolist()])


def _units(record: TraceRecord, index: int, count: int, block: int, seed: int) -> npt.NDArray[np.uint64]:
    """Return ``count`` pseudo-random words of 64 bits, equal wherever two prompts share a prefix."""
    ids = record.hash_ids[: -(-count // block)]
    parts = [scrambled(_key(seed, "block", str(hash_id)), 0, block) for hash_id in ids]
    left = count - block * len(ids)
    if left > 0:
        # Later turns of a session extend the earlier prompt: one endless stream per session.
        session = record.session_id and not record.hash_ids
        rest = _key(seed, "session", record.session_id) if session else _key(seed, "unique", str(index))
        parts.append(scrambled(rest, 0, left))
    return np.concatenate(parts)[:count]


def _key(seed: int, kind: str, name: str) -> int:
    return int.from_bytes(blake2b(f"{seed}\0{kind}\0{name}".encode(), digest_size=8).digest(), "little")


def scrambled(key: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Return ``count`` pseudo-random 64-bit numbers: those of ``key`` from position ``start`` on."""
    positions = np.arange(start, start + count, dtype=np.uint64)
    return _mix(np.uint64(key) + positions * np.uint64(0x9E3779B97F4A7C15))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finaliser of splitmix64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
