"""One emulated instance as its HTTP server sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from tidegate.core.errors import NoInstance
from tidegate.dataplane.sequence import LOADING, NEW, WAITING
from tidegate.engines.emulated.host import EmulatedInstance, Host
from tidegate.engines.serving.types import EngineStats, GenerateRequest, KvSource


class EmulatedEngine:
    """A ``ServedEngine``, and the ``KvPuller`` with which refused legs release their source."""

    def __init__(self, host: Host, place: EmulatedInstance) -> None:
        self._host = host
        self._place = place
        self._stopping = False

    def submit(self, request: GenerateRequest) -> None:
        """See ``ServedEngine.submit``."""
        if self._stopping:
            raise NoInstance("the engine is stopping")
        self._host.submit(self._place, request)

    def abort(self, request_id: str) -> None:
        """See ``ServedEngine.abort``."""
        self._host.abort(self._place, request_id)

    def release(self, request_id: str) -> bool:
        """See ``ServedEngine.release``."""
        return self._host.release(self._place, request_id)

    def stop(self) -> None:
        """Take nothing more and abort what runs."""
        self._stopping = True
        for request_id in list(self._place.legs):
            self.abort(request_id)

    def stats(self) -> EngineStats:
        """See ``ServedEngine.stats``."""
        self._host.pump.catch_up()
        self._host.pump.arm()
        place = self._place
        place.forget_old_pins()
        states = [leg.sequence.state for leg in place.legs.values()]
        waiting = states.count(NEW) + states.count(WAITING)
        loading = states.count(LOADING)
        blocks = place.batcher.blocks
        return EngineStats(
            running=len(states) - waiting - loading,
            waiting=waiting,
            loading=loading,
            pinned=sum(not held.over for held in place.pins.values()),
            free_blocks=blocks.free,
            total_blocks=blocks.total,
            block_tokens=blocks.block_tokens,
            kv_usage=1 - blocks.free / blocks.total,
            **asdict(place.counters),
        )


class Releaser:
    """The KvPuller of emulated instances: legs move their KV themselves; what is left is to release it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def submit(self, source: KvSource, block_ids: list[int], done: Callable[[str | None, int], None]) -> None:
        """See ``KvPuller.submit``; ``block_ids`` are empty."""
        self._host.release_source(source)
        done(None, 0)
