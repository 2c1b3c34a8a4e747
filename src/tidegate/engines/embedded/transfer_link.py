"""One connection from a puller to an exporter: asking, copying, releasing."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field

from tidegate.engines.embedded.transfer_shm import MappedStore, map_store
from tidegate.engines.embedded.transfer_wire import (
    STREAM_CHUNK_BYTES,
    ExporterFacts,
    KvSocket,
    TransferFailed,
    TransferLimits,
    greet_exporter,
)
from tidegate.engines.embedded.types import KvStore
from tidegate.engines.serving.secret import LaunchSecret, is_loopback
from tidegate.engines.serving.types import KvSource

Address = tuple[str, int]


class PullRefused(TransferFailed):
    """The peer, or the comparison with the peer's layout, says no; the connection itself is fine."""


@dataclass(frozen=True, slots=True)
class PullOptions:
    """What all pulls of an instance share. ``model`` must equal the exporter's."""

    secret: LaunchSecret
    model: str = ""
    limits: TransferLimits = field(default_factory=TransferLimits)
    shared_memory: bool = True


class PeerLink:
    """One connection past the handshake, with the peer's mapped store if there is one.

    A pull is ``ask``, ``copy``, ``release`` in this order. Every method raises TransferFailed;
    after anything but PullRefused the link is of no further use.
    """

    def __init__(self, wire: KvSocket, facts: ExporterFacts, options: PullOptions) -> None:
        self._wire = wire
        self._facts = facts
        self._options = options
        self._mapped: MappedStore | None = map_store(facts) if options.shared_memory else None

    @classmethod
    def open(cls, address: Address, options: PullOptions) -> PeerLink:
        """Connect and shake hands."""
        if not options.secret and not is_loopback(address[0]):
            raise TransferFailed("without a launch secret KV is pulled from loopback only")
        limits = options.limits
        try:
            sock = socket.create_connection(address, limits.connect_s)
        except (OSError, OverflowError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise TransferFailed(f"cannot connect: {why}") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = KvSocket(sock, limits.read_s)
        try:
            wire.limit(limits.read_s)
            facts = greet_exporter(wire, options.secret)
        except TransferFailed:
            wire.close()
            raise
        return cls(wire, facts, options)

    def ask(self, source: KvSource, count: int, store: KvStore) -> None:
        """Ask for the first ``count`` blocks of ``source``; with 0 release the pin and nothing else.

        Starts the pull's deadline. A pull that cannot fit ``store`` releases the pin and is refused.
        """
        self._wire.limit(self._options.limits.pull_s)
        if count == 0:
            self.release(source.request_id)
            return
        misfit = self._misfit(source, count, store)
        if misfit:
            self.release(source.request_id)
            raise PullRefused(misfit)
        self._wire.send(
            {
                "op": "pull",
                "request_id": source.request_id,
                "engine_id": source.engine_id,
                "block_ids": list(source.block_ids[:count]),
                "stream": self._mapped is None,
            }
        )
        answer = self._wire.receive()
        if answer.get("ok") is not True:
            raise PullRefused(str(answer.get("error")))

    def copy(self, source: KvSource, ours: list[int], store: KvStore) -> int:
        """Copy the blocks that ``ask`` asked for into ``ours``; return the bytes moved."""
        if self._mapped is None:
            self._copy_stream(ours, store)
        else:
            self._copy_mapped(self._mapped, source, ours, store)
        return len(ours) * store.block_bytes

    def release(self, request_id: str) -> bool:
        """Have the peer unpin; True when the pin held until now."""
        self._wire.send({"op": "release", "request_id": request_id})
        return self._wire.receive().get("valid") is True

    def interrupt(self) -> None:
        """Break the connection, from any thread."""
        self._wire.close()

    def close(self) -> None:
        """Close the connection and the mapping; only the thread that copies may."""
        self._wire.close()
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    def _copy_mapped(self, mapped: MappedStore, source: KvSource, ours: list[int], store: KvStore) -> None:
        try:
            for theirs, target in zip(source.block_ids, ours, strict=False):
                with mapped.read_block(theirs) as view:
                    store.write_block(target, view)
        except Exception:
            with contextlib.suppress(TransferFailed):
                self.release(source.request_id)
            raise

    def _copy_stream(self, ours: list[int], store: KvStore) -> None:
        size = store.block_bytes
        at_once = max(1, STREAM_CHUNK_BYTES // size)
        buffer = memoryview(bytearray(min(at_once, len(ours)) * size))
        for start in range(0, len(ours), at_once):
            targets = ours[start : start + at_once]
            self._wire.receive_into(buffer[: len(targets) * size])
            for index, target in enumerate(targets):
                store.write_block(target, buffer[index * size : (index + 1) * size])

    def _misfit(self, source: KvSource, count: int, store: KvStore) -> str | None:
        """Say why the peer's blocks cannot be used here, or return None."""
        facts = self._facts
        if (facts.block_bytes, facts.block_tokens) != (store.block_bytes, store.block_tokens):
            return (
                f"the peer's blocks are {facts.block_bytes} bytes for {facts.block_tokens} tokens, "
                f"ours {store.block_bytes} for {store.block_tokens}"
            )
        if facts.model != self._options.model:
            return "the peer serves another model or KV layout"
        if len(source.block_ids) < count:
            return f"the handle has {len(source.block_ids)} blocks; {count} are needed"
        return None
