"""The pulling side: a peer's KV blocks copied into the local store beside the compute thread.

Each peer has its own transfer thread and one kept connection, so that a dead peer delays nobody else. After
the copy the peer is told to release its pin; only its answer that the pin held makes the copy valid.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tidegate.engines.embedded.kv_channel import (
    STREAM_CHUNK_BYTES,
    KvSocket,
    TransferFailed,
    TransferLimits,
    TransferTimedOut,
    greet_exporter,
    map_store,
)
from tidegate.engines.embedded.kv_store import PagedKvStore
from tidegate.engines.serving.secret import LaunchSecret, is_loopback
from tidegate.engines.serving.types import KvSource

log = logging.getLogger(__name__)

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
    """One connection past the handshake, with the peer's mapped store if there is one. A pull is ``ask``,
    ``copy``, ``release`` in this order. Every method raises TransferFailed; after anything but PullRefused
    the link is of no further use."""

    def __init__(self, address: Address, options: PullOptions, store: PagedKvStore) -> None:
        """Connect and shake hands."""
        self._options = options
        self._store = store
        if not options.secret and not is_loopback(address[0]):
            raise TransferFailed("without a launch secret KV is pulled from loopback only")
        limits = options.limits
        try:
            sock = socket.create_connection(address, limits.connect_s)
        except (OSError, OverflowError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise TransferFailed(f"cannot connect: {why}") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wire = KvSocket(sock, limits.read_s)
        try:
            self._wire.limit(limits.read_s)
            self._facts = greet_exporter(self._wire, options.secret)
        except TransferFailed:
            self._wire.close()
            raise
        self._mapped = map_store(self._facts) if options.shared_memory else None

    def ask(self, source: KvSource, count: int) -> None:
        """Ask for the first ``count`` blocks of ``source``; with 0 release the pin and nothing else. Starts
        the pull's deadline. A pull that cannot fit the store releases the pin and is refused."""
        self._wire.limit(self._options.limits.pull_s)
        if count == 0:
            self.release(source.request_id)
            return
        misfit = self._misfit(source, count)
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

    def copy(self, source: KvSource, ours: list[int]) -> int:
        """Copy the blocks that ``ask`` asked for into ``ours``; return the bytes moved."""
        if self._mapped is None:
            self._copy_stream(ours)
        else:
            self._copy_mapped(self._mapped, source, ours)
        return len(ours) * self._store.block_bytes

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

    def _copy_mapped(self, mapped: mmap.mmap, source: KvSource, ours: list[int]) -> None:
        size = self._store.block_bytes
        try:
            with memoryview(mapped) as whole:
                for theirs, target in zip(source.block_ids, ours, strict=False):
                    with whole[theirs * size : (theirs + 1) * size] as block:
                        self._store.write_block(target, block)
        except Exception:
            with contextlib.suppress(TransferFailed):
                self.release(source.request_id)
            raise

    def _copy_stream(self, ours: list[int]) -> None:
        size = self._store.block_bytes
        at_once = max(1, STREAM_CHUNK_BYTES // size)
        buffer = memoryview(bytearray(min(at_once, len(ours)) * size))
        for start in range(0, len(ours), at_once):
            targets = ours[start : start + at_once]
            self._wire.receive_into(buffer[: len(targets) * size])
            for index, target in enumerate(targets):
                self._store.write_block(target, buffer[index * size : (index + 1) * size])

    def _misfit(self, source: KvSource, count: int) -> str | None:
        """Say why the peer's blocks cannot be used here, or return None."""
        facts, store = self._facts, self._store
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


Done = Callable[[str | None, int], None]


@dataclass(frozen=True, slots=True)
class _Job:
    source: KvSource
    block_ids: list[int]
    done: Done
    submitted_s: float


class PeerPuller:
    """Copies peers' blocks into the local store in the background, beside the compute thread."""

    def __init__(self, store: PagedKvStore, options: PullOptions) -> None:
        self._store = store
        self._options = options
        self._lock = threading.Lock()
        self._workers: dict[Address, _PeerWorker] = {}
        self._closed = False

    def submit(self, source: KvSource, block_ids: list[int], done: Done) -> None:
        """Copy ``source``'s first ``len(block_ids)`` blocks into the local ``block_ids``; never blocks.

        ``done(error, bytes_moved)`` is called once, on a transfer thread: ``error`` None means that the
        blocks are valid. A peer that can be reached is told to release its pin, also when the copy failed.
        """
        address = (source.host, source.port)
        with self._lock:
            if not self._closed:
                worker = self._workers.get(address)
                if worker is None:
                    worker = self._workers[address] = _PeerWorker(address, self._store, self._options)
                    worker.start()
                worker.jobs.put(_Job(source, block_ids, done, time.monotonic()))
                return
        done("the instance is shutting down", 0)

    def release(self, source: KvSource) -> None:
        """Have the peer unpin what nobody is going to pull; failure is silent (the lease ends it)."""
        self.submit(source, [], lambda error, moved: None)

    def close(self, wait_s: float = 2.0) -> None:
        """Finish what is queued, for at most ``wait_s``, then drop the connections."""
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
        for worker in workers:
            worker.jobs.put(None)
        end_s = time.monotonic() + wait_s
        for worker in workers:
            worker.join(max(0.0, end_s - time.monotonic()))
        for worker in workers:
            worker.drop()


class _PeerWorker(threading.Thread):
    """The transfer thread of one peer, until it takes None. Closes its connection after ``idle_s`` without a
    job."""

    def __init__(self, address: Address, store: PagedKvStore, options: PullOptions) -> None:
        super().__init__(name=f"kv-pull-{address[0]}:{address[1]}", daemon=True)
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._address = address
        self._store = store
        self._options = options
        self._link: PeerLink | None = None
        self._unreachable: tuple[float, str] = (float("-inf"), "")

    def drop(self) -> None:
        """Break the connection; a pull under way fails."""
        link = self._link
        if link is not None:
            link.interrupt()

    def run(self) -> None:
        while (job := self._next()) is not None:
            error, moved = self._attempt(job)
            if error is not None:
                log.warning("%s", error)
            try:
                job.done(error, moved)
            except Exception:
                log.exception("the receiver of a finished pull failed")
        self._forget_link()

    def _next(self) -> _Job | None:
        try:
            return self.jobs.get(timeout=self._options.limits.idle_s)
        except queue.Empty:
            self._forget_link()
            return self.jobs.get()

    def _attempt(self, job: _Job) -> tuple[str | None, int]:
        failed_s, why = self._unreachable
        if job.submitted_s <= failed_s:
            # Queued while the peer was found unreachable: one deadline is enough for all of them.
            return why, 0
        where = f"{self._address[0]}:{self._address[1]}"
        try:
            return None, self._pull(job)
        except PullRefused as failure:
            why = failure.message
        except TransferFailed as failure:
            self._forget_link()
            why = failure.message
        except Exception as error:
            log.exception("pulling KV from %s failed", where)
            self._forget_link()
            why = repr(error)
        return f"pulling KV from {job.source.engine_id} at {where}: {why}", 0

    def _pull(self, job: _Job) -> int:
        source = job.source
        link = self._asked(source, len(job.block_ids))
        if not job.block_ids:
            return 0
        moved = link.copy(source, job.block_ids)
        if not link.release(source.request_id):
            raise TransferFailed("the peer's pin ended during the copy")
        return moved

    def _asked(self, source: KvSource, count: int) -> PeerLink:
        """Return a link on which the peer has agreed to the pull."""
        kept = self._link is not None
        link = self._connected()
        try:
            link.ask(source, count)
            return link
        except (PullRefused, TransferTimedOut):
            raise
        except TransferFailed:
            if not kept:
                raise
            # The peer may have closed the kept connection since; nothing was copied yet.
            self._forget_link()
            return self._asked(source, count)

    def _connected(self) -> PeerLink:
        if self._link is None:
            try:
                self._link = PeerLink(self._address, self._options, self._store)
            except TransferFailed as failure:
                self._unreachable = (time.monotonic(), failure.message)
                raise
        return self._link

    def _forget_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
