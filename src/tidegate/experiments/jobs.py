"""Jobs in worker processes, each done once: what the store has is not done again."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from tidegate.experiments.store import Store


@dataclass(frozen=True, slots=True)
class Job:
    """A call of a module-level function with plain arguments; ``key`` names its result for good.

    ``title`` is what a progress bar says while it runs.
    """

    key: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    title: str = ""


class Workers:
    """Does jobs in ``processes`` processes, in this one when that is 1. An asynchronous context manager.

    ``watch`` is called after every job with the numbers of jobs that ended and that are known of so far, and
    the last job's title.
    """

    def __init__(
        self, processes: int, store: Store, watch: Callable[[int, int, str], None] | None = None
    ) -> None:
        self.done = 0
        self.found = 0
        self._store = store
        self._watch = watch or (lambda ended, known, title: None)
        self._under_way: dict[str, asyncio.Future[Any]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            # Not forked: the parent may hold locks of other threads at that moment.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker)

    async def __aenter__(self) -> Workers:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._pool is None:
            return
        if error[0] is not None:
            # Their results are not wanted any more, and a job may take long.
            for future in self._under_way.values():
                future.cancel()
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(wait=error[0] is None, cancel_futures=True)

    async def do(self, job: Job) -> Any:
        """Return the job's result: the store's, or that of doing it, which the store then keeps.

        Raises what the job raises. Two jobs of one key are one.
        """
        known = self._store.get(job.key)
        if known is not None:
            self.found += 1
            return known
        future = self._under_way.get(job.key)
        if future is None:
            future = self._under_way[job.key] = asyncio.ensure_future(self._really_do(job))
        return await future

    async def _really_do(self, job: Job) -> Any:
        if self._pool is None:
            await asyncio.sleep(0)
            result = job.call(*job.arguments)
        else:
            result = await asyncio.get_running_loop().run_in_executor(self._pool, job.call, *job.arguments)
        self._store.put(job.key, result)
        del self._under_way[job.key]
        self.done += 1
        self._watch(self.done, self.done + len(self._under_way), job.title)
        return result


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
