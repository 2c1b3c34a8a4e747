"""Jobs in worker processes, and the store of their results, which outlives a killed run.

What the store has is not done again: a result is a JSON line, by the digest of all that went into it.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tidegate.core.errors import ConfigError, InternalError, TidegateError


@dataclass(frozen=True, slots=True)
class Job:
    """A call that can be pickled; ``key`` names its result for good, ``title`` is for a progress bar."""

    key: str
    call: Callable[[], Any]
    title: str = ""


class Store:
    """A file of finished results. One process writes it, a line at a time, so a kill loses at most a line."""

    def __init__(self, path: Path | None) -> None:
        """Read what ``path`` holds; None keeps results in memory. Raises ConfigError for an unusable file."""
        self._results: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            kept = path.read_bytes()
            if kept and not kept.endswith(b"\n"):
                self._file.write(b"\n")  # half a line of a killed writer
        except OSError as error:
            raise ConfigError(f"cannot keep results in {path}: {error.strerror or error}") from None
        for line in kept.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._results[entry["key"]] = entry["value"]

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> Any | None:
        """Return a result, or None when it is not there."""
        return self._results.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a result; it is in the file when this returns."""
        self._results[key] = value
        if self._file is not None:
            line = json.dumps({"key": key, "value": value}, allow_nan=False)
            self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Workers:
    """Does jobs in ``processes`` processes, in this one when that is 1. An asynchronous context manager.

    ``watch`` is called after every job with the share of the expected work that is done, the job's title, and
    the share that was done here and not found in the store.
    """

    def __init__(
        self, processes: int, store: Store, watch: Callable[[float, str, float], None] | None = None
    ) -> None:
        self._done = 0
        self._expected = self._credited = 0.0
        self._store = store
        self._watch = watch or (lambda share, title, fresh: None)
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

    def expect(self, runs: float) -> None:
        """Take note of how many runs all work is thought to take: the total, which stays what it is."""
        self._expected = runs

    def credit(self, runs: float) -> None:
        """Count work as done, whatever it took."""
        self._credited += runs

    async def do(self, job: Job) -> Any:
        """Return the job's result: the store's, or that of doing it, which the store then keeps.

        Raises what the job raises. Two jobs of one key are one.
        """
        known = self._store.get(job.key)
        if known is not None:
            return known
        future = self._under_way.get(job.key)
        if future is None:
            future = self._under_way[job.key] = asyncio.ensure_future(self._really_do(job))
        return await future

    async def _really_do(self, job: Job) -> Any:
        if self._pool is None:
            await asyncio.sleep(0)
            result = _called(job.call)
        else:
            try:
                result = await asyncio.get_running_loop().run_in_executor(self._pool, _called, job.call)
            except BrokenProcessPool:
                raise InternalError(
                    "a worker process was killed in the middle of a run (out of memory?); try fewer --jobs"
                ) from None
        self._store.put(job.key, result)
        del self._under_way[job.key]
        self._done += 1
        whole = max(1.0, self._expected)
        self._watch(min(1.0, self._credited / whole), job.title, min(1.0, self._done / whole))
        return result


def _called(call: Callable[[], Any]) -> Any:
    """Do a job. What it raises can be sent home from a worker, whatever a third party's system raises."""
    try:
        return call()
    except TidegateError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
        raise InternalError(f"{place}: {type(error).__name__}: {error}") from error


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
