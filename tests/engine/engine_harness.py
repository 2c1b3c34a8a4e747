"""Drives engines by hand: no threads, no waiting, every interleaving chosen by the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tests.engine.block_checks import check_blocks
from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.kv_pull import PeerPuller
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.embedded.tiny_model import Arch
from tidegate.engines.serving.types import GenerateRequest, KvSource, Output, SamplingParams


class MakeModel(Protocol):
    """Makes a tiny model, once per architecture and window, and returns its folder."""

    def __call__(self, arch: Arch = "llama", sliding_window: int | None = None) -> Path: ...


class HandClock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def now(self) -> float:
        return self.at_s


@dataclass
class Leg:
    """Everything one request said."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    last: Output | None = None

    @property
    def reason(self) -> str | None:
        return self.last.finish_reason if self.last else None


class Driven:
    """An engine whose steps the test takes, with what its requests have said so far."""

    def __init__(self, model: Path, clock: HandClock | None = None, **config: Any) -> None:
        self.clock = clock or HandClock()
        settings: dict[str, Any] = {"dtype": "float64", "total_blocks": 256, **config}
        self.engine = EmbeddedEngine(EngineConfig(model, **settings), self.clock)
        self.legs: dict[str, Leg] = {}

    def submit(self, request: GenerateRequest) -> None:
        self.legs[request.id] = Leg()
        self.engine.submit(request)

    def step(self) -> int:
        step = self.engine.step()
        for output in step.outputs:
            leg = self.legs[output.request_id]
            assert leg.reason is None, "an output after the last one"
            leg.token_ids += output.token_ids
            leg.text += output.text
            leg.last = output
        return step.tokens

    def drain(self) -> None:
        """Step until nothing can be computed."""
        while self.step() or self.engine._inbox:
            pass

    def run(self, *requests: GenerateRequest) -> list[Leg]:
        for request in requests:
            self.submit(request)
        self.drain()
        legs = [self.legs[request.id] for request in requests]
        assert all(leg.reason for leg in legs)
        return legs

    def assert_clean(self) -> None:
        """Nothing runs and every block is free."""
        check_blocks(self.engine.scheduler)
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.loading, stats.pinned) == (0, 0, 0, 0)
        assert stats.free_blocks == stats.total_blocks


class HandPuller(PeerPuller):
    """A puller that copies between in-process engines when the test says so."""

    def __init__(self, local: EmbeddedEngine, peers: dict[str, EmbeddedEngine]) -> None:
        self._local = local
        self._peers = peers
        self.jobs: list[tuple[KvSource, list[int], Callable[[str | None, int], None]]] = []

    def submit(self, source: KvSource, block_ids: list[int], done: Callable[[str | None, int], None]) -> None:
        self.jobs.append((source, block_ids, done))

    def release(self, source: KvSource) -> None:
        self.submit(source, [], lambda error, moved: None)

    def deliver(self, error: str | None = None) -> int:
        """Finish every submitted pull, all with ``error`` if given; return how many there were."""
        jobs, self.jobs = self.jobs, []
        for source, block_ids, done in jobs:
            peer = self._peers[source.engine_id]
            if error is not None:
                done(error, 0)
                continue
            for theirs, ours in zip(source.block_ids, block_ids, strict=False):
                self._local.store.write_block(ours, peer.store.read_block(theirs))
            moved = len(block_ids) * self._local.store.block_bytes
            done(None if peer.release(source.request_id) else "the pin was gone", moved)
        return len(jobs)


def request(
    request_id: str,
    prompt: list[int] | tuple[int, ...],
    max_tokens: int = 16,
    *,
    generated: int = 0,
    salt: str = "",
    pin_kv: bool = False,
    source: KvSource | None = None,
    **params: Any,
) -> GenerateRequest:
    """A greedy request that ignores EOS unless told otherwise."""
    sampling = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True, **params})
    return GenerateRequest(request_id, tuple(prompt), sampling, generated, salt, pin_kv, source)


def source_of(driven: Driven, request_id: str) -> KvSource:
    """The handle a finished, pinned leg left behind."""
    last = driven.legs[request_id].last
    assert last is not None and last.pinned is not None
    pin = last.pinned
    return KvSource(driven.engine.config.engine_id, request_id, "127.0.0.1", 1, pin.block_ids, pin.num_tokens)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(5, 512, length)]
