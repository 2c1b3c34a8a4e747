"""Copies of requests that are nobody else: sessions, clients and prefix blocks under names of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b

from tidegate.workloads.trace import TraceRecord


class Renaming:
    """Gives records new session and client names and block ids; equal names and ids stay equal.

    ``label`` marks the copy, as in ``a~label/agent_1``; two labels never give one id.
    """

    def __init__(self, label: str) -> None:
        self._suffix = f"~{label}"
        self._ids = _Ids(label)

    def __call__(self, record: TraceRecord) -> TraceRecord:
        session, slash, agent = record.session_id.partition("/")
        return replace(
            record,
            session_id=f"{session}{self._suffix}{slash}{agent}" if session else "",
            client_id=record.client_id and record.client_id + self._suffix,
            hash_ids=tuple([self._ids[i] for i in record.hash_ids]),
        )


class _Ids(dict[int, int]):
    """New ids by old one, made on first use and kept, so that records share the number objects."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label = label

    def __missing__(self, old: int) -> int:
        digest = blake2b(f"{self._label}\0{old}".encode(), digest_size=8).digest()
        # 62 bits fit every reader's signed integer.
        new = self[old] = int.from_bytes(digest, "little") >> 2
        return new


def apart(traces: Iterable[Iterable[TraceRecord]]) -> list[Iterator[TraceRecord]]:
    """Return the traces such that none shares a session, client or block with another.

    The first keeps its names; the others are renamed by their position.
    """
    return [iter(t) if k == 0 else map(Renaming(f"t{k}"), t) for k, t in enumerate(traces)]
