"""The pulling side: a peer's KV blocks copied into the local store beside the compute thread.

Each peer has its own transfer threads, for pulls and for decodes that are taken over, each with one kept
connection, so that a dead peer delays nobody else. After a pull the peer is told to release its pin; only its
answer that the pin held makes the copy valid.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

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
from tidegate.engines.embedded.stages import StageAnswer, StageQuestion
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
    ``copy``, ``release`` in this order; taking a decode over is ``stage`` and ``copy``, again and again, and
    ``commit``. Every method raises TransferFailed; after anything but PullRefused the link is of no further
    use."""

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
        misfit = self._misfit()
        if len(source.block_ids) < count:
            misfit = misfit or f"the handle has {len(source.block_ids)} blocks; {count} are needed"
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
        self._agreed()

    def stage(self, engine_id: str, question: StageQuestion) -> StageAnswer:
        """Ask for the next stage of a decode of ``engine_id``; the first question starts the deadline of all.
        The answer's blocks are to be copied before anything else is said."""
        if question.epoch is None:
            self._wire.limit(self._options.limits.pull_s)
            misfit = self._misfit()
            if misfit:
                raise PullRefused(misfit)
        stream = {"op": "stage", "engine_id": engine_id, "stream": self._mapped is None}
        self._wire.send({**stream, **asdict(question)})
        answer = self._agreed()
        try:
            return StageAnswer(**answer["stage"])
        except (KeyError, TypeError):
            raise TransferFailed("the peer's answer is malformed") from None

    def commit(self, request_id: str) -> bool:
        """Take over a decode that has paused; False when it goes on there."""
        self._wire.send({"op": "commit", "request_id": request_id})
        return self._wire.receive().get("valid") is True

    def stay(self, request_id: str) -> None:
        """Have a decode that has paused go on there."""
        self._wire.send({"op": "stay", "request_id": request_id})
        self._wire.receive()

    def copy(self, theirs: Sequence[int], ours: Sequence[int]) -> int:
        """Copy the blocks that were agreed on, ``theirs``, into ``ours``; return the bytes moved."""
        if self._mapped is None:
            self._copy_stream(ours)
        else:
            self._copy_mapped(self._mapped, theirs, ours)
        return len(ours) * self._store.block_bytes

    def _agreed(self) -> dict[str, Any]:
        answer = self._wire.receive()
        if answer.get("ok") is not True:
            raise PullRefused(str(answer.get("error")))
        return answer

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

    def _copy_mapped(self, mapped: mmap.mmap, theirs: Sequence[int], ours: Sequence[int]) -> None:
        size = self._store.block_bytes
        with memoryview(mapped) as whole:
            for block_id, target in zip(theirs, ours, strict=False):
                with whole[block_id * size : (block_id + 1) * size] as block:
                    self._store.write_block(target, block)

    def _copy_stream(self, ours: Sequence[int]) -> None:
        size = self._store.block_bytes
        at_once = max(1, STREAM_CHUNK_BYTES // size)
        buffer = memoryview(bytearray(min(at_once, len(ours)) * size))
        for start in range(0, len(ours), at_once):
            targets = ours[start : start + at_once]
            self._wire.receive_into(buffer[: len(targets) * size])
            for index, target in enumerate(targets):
                self._store.write_block(target, buffer[index * size : (index + 1) * size])

    def _misfit(self) -> str | None:
        """Say why the peer's blocks cannot be used here, or return None."""
        facts, store = self._facts, self._store
        if (facts.block_bytes, facts.block_tokens) != (store.block_bytes, store.block_tokens):
            return (
                f"the peer's blocks are {facts.block_bytes} bytes for {facts.block_tokens} tokens, "
                f"ours {store.block_bytes} for {store.block_tokens}"
            )
        if facts.model != self._options.model:
            return "the peer serves another model or KV layout"
        return None


Done = Callable[[str | None, int], None]


class TransferJob(Protocol):
    """What a transfer thread does for ``done``, which it calls once: with an error, or with None and the
    bytes moved. ``owner`` names the peer's engine."""

    owner: str
    done: Done
    submitted_s: float

    def open(self, link: PeerLink) -> None:
        """Have the peer agree. Done anew on another connection when a kept one turns out to be broken."""
        ...

    def carry_out(self, link: PeerLink) -> int:
        """Do the rest; return the bytes moved."""
        ...


class _PullJob:
    """Copies pinned blocks and releases the pin; without ``block_ids`` it only releases."""

    def __init__(self, source: KvSource, block_ids: list[int], done: Done) -> None:
        self.owner = source.engine_id
        self.done = done
        self.submitted_s = time.monotonic()
        self._source = source
        self._ours = block_ids

    def open(self, link: PeerLink) -> None:
        link.ask(self._source, len(self._ours))

    def carry_out(self, link: PeerLink) -> int:
        if not self._ours:
            return 0
        request_id = self._source.request_id
        try:
            moved = link.copy(self._source.block_ids, self._ours)
        except TransferFailed:
            raise
        except Exception:
            with contextlib.suppress(TransferFailed):
                link.release(request_id)
            raise
        if not link.release(request_id):
            raise TransferFailed("the peer's pin ended during the copy")
        return moved


class PeerPuller:
    """Copies peers' blocks into the local store in the background, beside the compute thread."""

    def __init__(self, store: PagedKvStore, options: PullOptions) -> None:
        self._store = store
        self._options = options
        self._lock = threading.Lock()
        self._workers: dict[tuple[Address, type], _PeerWorker] = {}
        self._closed = False

    def submit(self, source: KvSource, block_ids: list[int], done: Done) -> None:
        """Copy ``source``'s first ``len(block_ids)`` blocks into the local ``block_ids``; never blocks.

        ``done(error, bytes_moved)`` is called once, on a transfer thread: ``error`` None means that the
        blocks are valid. A peer that can be reached is told to release its pin, also when the copy failed.
        """
        self.run((source.host, source.port), _PullJob(source, block_ids, done))

    def run(self, address: Address, job: TransferJob) -> None:
        """Have a transfer thread do a job with the peer at ``address``; never blocks. Jobs of one kind and
        peer are done one after another."""
        lane = address, type(job)
        with self._lock:
            if not self._closed:
                worker = self._workers.get(lane)
                if worker is None:
                    worker = self._workers[lane] = _PeerWorker(address, self._store, self._options)
                    worker.start()
                worker.jobs.put(job)
                return
        job.done("the instance is shutting down", 0)

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
    """A transfer thread of one peer, until it takes None. Closes its connection after ``idle_s`` without a
    job."""

    def __init__(self, address: Address, store: PagedKvStore, options: PullOptions) -> None:
        super().__init__(name=f"kv-pull-{address[0]}:{address[1]}", daemon=True)
        self.jobs: queue.SimpleQueue[TransferJob | None] = queue.SimpleQueue()
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

    def _next(self) -> TransferJob | None:
        try:
            return self.jobs.get(timeout=self._options.limits.idle_s)
        except queue.Empty:
            self._forget_link()
            return self.jobs.get()

    def _attempt(self, job: TransferJob) -> tuple[str | None, int]:
        failed_s, why = self._unreachable
        if job.submitted_s <= failed_s:
            # Queued while the peer was found unreachable: one deadline is enough for all of them.
            return why, 0
        where = f"{self._address[0]}:{self._address[1]}"
        try:
            return None, job.carry_out(self._opened(job))
        except PullRefused as failure:
            why = failure.message
        except TransferFailed as failure:
            self._forget_link()
            why = failure.message
        except Exception as error:
            log.exception("pulling KV from %s failed", where)
            self._forget_link()
            why = repr(error)
        return f"pulling KV from {job.owner} at {where}: {why}", 0

    def _opened(self, job: TransferJob) -> PeerLink:
        """Return a link on which the peer has agreed to the job."""
        kept = self._link is not None
        link = self._connected()
        try:
            job.open(link)
            return link
        except (PullRefused, TransferTimedOut):
            raise
        except TransferFailed:
            if not kept:
                raise
            # The peer may have closed the kept connection since; nothing was copied yet.
            self._forget_link()
            return self._opened(job)

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
