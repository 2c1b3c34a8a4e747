"""The pulling side: a peer's KV blocks copied into the local store beside the compute thread.

Each peer has its own transfer thread and one kept connection, so that a dead peer delays nobody
else. Blocks come through shared memory where the exporter's store can be mapped, else as bytes on
the connection. After the copy the peer is told to release its pin; only its answer that the pin
held throughout makes the copy valid.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tidegate.engines.embedded.transfer_export import KvExporter
from tidegate.engines.embedded.transfer_link import Address, PeerLink, PullOptions, PullRefused
from tidegate.engines.embedded.transfer_wire import TransferFailed, TransferLimits, TransferTimedOut
from tidegate.engines.embedded.types import KvStore
from tidegate.engines.serving.types import KvSource

__all__ = ["KvExporter", "PeerPuller", "PullOptions", "TransferFailed", "TransferLimits"]

log = logging.getLogger(__name__)

Done = Callable[[str | None, int], None]


@dataclass(frozen=True, slots=True)
class _Job:
    source: KvSource
    block_ids: list[int]
    done: Done
    submitted_s: float


class PeerPuller:
    """A KvPuller over the KV channel. ``submit`` never blocks; ``done`` is never called twice at once.

    A pull always ends by releasing the peer's pin if the peer can be reached, also when the copy
    failed or when nobody wants the blocks any more. Without blocks ``submit`` only releases.
    """

    def __init__(self, store: KvStore, options: PullOptions) -> None:
        self._store = store
        self._options = options
        self._lock = threading.Lock()
        self._done_lock = threading.Lock()
        self._workers: dict[Address, _PeerWorker] = {}
        self._closed = False

    def submit(self, source: KvSource, block_ids: list[int], done: Done) -> None:
        job = _Job(source, block_ids, self._serialised(done), time.monotonic())
        address = (source.host, source.port)
        with self._lock:
            worker = self._workers.get(address)
            if not self._closed:
                if worker is None or not worker.offer(job):
                    worker = _PeerWorker(address, self._store, self._options)
                    self._workers[address] = worker
                    worker.offer(job)
                    worker.start()
                return
        job.done("the instance is shutting down", 0)

    def close(self, wait_s: float = 2.0) -> None:
        """Finish what is queued, for at most ``wait_s``, then drop the connections."""
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
        for worker in workers:
            worker.retire()
        end_s = time.monotonic() + wait_s
        for worker in workers:
            worker.join(max(0.0, end_s - time.monotonic()))
        for worker in workers:
            worker.drop()

    def _serialised(self, done: Done) -> Done:
        def call(error: str | None, moved: int) -> None:
            with self._done_lock:
                done(error, moved)

        return call


class _PeerWorker:
    """The transfer thread of one peer. Retires itself, with its connection, after an idle spell."""

    def __init__(self, address: Address, store: KvStore, options: PullOptions) -> None:
        self._address = address
        self._store = store
        self._options = options
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._retired = False
        self._link: PeerLink | None = None
        self._unreachable: tuple[float, str] = (float("-inf"), "")
        self._thread = threading.Thread(
            target=self._run, name=f"kv-pull-{address[0]}:{address[1]}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def offer(self, job: _Job) -> bool:
        """Queue a job; False when the worker has retired."""
        with self._lock:
            if not self._retired:
                self._jobs.put(job)
            return not self._retired

    def retire(self) -> None:
        """Take no further jobs; the thread ends after those queued."""
        with self._lock:
            if not self._retired:
                self._retired = True
                self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def drop(self) -> None:
        """Break the connection; a pull under way fails."""
        link = self._link
        if link is not None:
            link.interrupt()

    def _run(self) -> None:
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
            return self._jobs.get(timeout=self._options.limits.idle_s)
        except queue.Empty:
            self.retire()
            return self._jobs.get()

    def _attempt(self, job: _Job) -> tuple[str | None, int]:
        failed_s, why = self._unreachable
        if job.submitted_s <= failed_s:
            # Queued while the peer was found unreachable: one deadline is enough for all of them.
            return why, 0
        where = f"{self._address[0]}:{self._address[1]}"
        try:
            return None, self._pull(job)
        except TransferFailed as failure:
            if not isinstance(failure, PullRefused):
                self._forget_link()
            return f"pulling KV from {job.source.engine_id} at {where}: {failure.message}", 0
        except Exception as error:
            log.exception("pulling KV from %s failed", where)
            self._forget_link()
            return f"pulling KV from {job.source.engine_id} at {where}: {error!r}", 0

    def _pull(self, job: _Job) -> int:
        source, count = job.source, len(job.block_ids)
        link = self._asked(source, count)
        if not job.block_ids:
            return 0
        moved = link.copy(source, job.block_ids, self._store)
        if not link.release(source.request_id):
            raise TransferFailed("the peer's pin ended during the copy")
        return moved

    def _asked(self, source: KvSource, count: int) -> PeerLink:
        """Return a link on which the peer has agreed to the pull."""
        link, kept = self._connected()
        try:
            link.ask(source, count, self._store)
            return link
        except (PullRefused, TransferTimedOut):
            raise
        except TransferFailed:
            if not kept:
                raise
        # The peer may have closed the kept connection since; nothing was copied yet.
        self._forget_link()
        link, _ = self._connected()
        link.ask(source, count, self._store)
        return link

    def _connected(self) -> tuple[PeerLink, bool]:
        if self._link is not None:
            return self._link, True
        try:
            self._link = PeerLink.open(self._address, self._options)
        except TransferFailed as failure:
            self._unreachable = (time.monotonic(), failure.message)
            raise
        return self._link, False

    def _forget_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
