"""Copies of requests that are nobody else: sessions, clients and prefix blocks under names of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b

from tidegate.workloads.trace import Workload, optional


def renamed(workload: Workload, label: str) -> Workload:
    """Give the requests new session and client names and block ids; equal names and ids stay equal.

    ``label`` marks the copy, as in ``a~label/agent_1``; two labels never give one id.
    """
    suffix = f"~{label}"
    ids = _Ids(label)
    sessions, clients, blocks = workload.session_id, workload.client_id, workload.hash_ids
    if sessions is not None:
        parts = (name.partition("/") for name in sessions)
        sessions = optional("session_id", [a and f"{a}{suffix}{slash}{b}" for a, slash, b in parts])
    if clients is not None:
        clients = optional("client_id", [name and name + suffix for name in clients])
    if blocks is not None:
        blocks = optional("hash_ids", [tuple([ids[i] for i in row]) for row in blocks])
    return replace(workload, session_id=sessions, client_id=clients, hash_ids=blocks)


class _Ids(dict[int, int]):
    """New ids by old one, made on first use and kept, so that rows share the number objects."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label = label

    def __missing__(self, old: int) -> int:
        digest = blake2b(f"{self._label}\0{old}".encode(), digest_size=8).digest()
        # 62 bits fit every reader's signed integer.
        new = self[old] = int.from_bytes(digest, "little") >> 2
        return new


def apart(workloads: Iterable[Workload]) -> list[Workload]:
    """Return the workloads such that none shares a session, client or block with another.

    The first keeps its names; the others are renamed by their position.
    """
    return [renamed(one, f"t{k}") if k else one for k, one in enumerate(workloads)]
