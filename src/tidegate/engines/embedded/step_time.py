"""What the steps of an engine take: stretched to a share of a core, and compared with its profile."""

from __future__ import annotations

import time
from dataclasses import replace

from tidegate.costs.drift import ProfileDrift
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import Profile
from tidegate.engines.embedded.model import Batch

NOTICED = 1.05
"""Predictions follow where steps are off by more than this factor (ours)."""


class CoreShare:
    """Stretches steps so that the model takes at most ``share`` of a core; what comes before and after it in
    a step, and HTTP, comes on top.

    Engines that share cores slow each other down by whatever the others do. Where shares leave enough of the
    cores for the rest, a step takes the same time whatever they do, as on hardware of its own.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._began_s = self._cpu_s = 0.0

    def begin(self) -> None:
        """A step begins on this thread."""
        self._began_s, self._cpu_s = time.perf_counter(), time.thread_time()

    def end(self) -> None:
        """Sleep until the share has passed what this thread computed since ``begin``."""
        if self._share < 1.0:
            takes_s = (time.thread_time() - self._cpu_s) / self._share
            time.sleep(max(0.0, self._began_s + takes_s - time.perf_counter()))


class StepTimes:
    """Follows what steps took, with chunks of prompts and without, by factors on what was ``measured``.

    What was measured before the engine served is off where other processes take its cores or its memory's
    bandwidth, or where a profile says nothing of steps with chunks. Chunks that use all slack of the decodes
    would then be too long, every time.
    """

    def __init__(self, measured: Profile) -> None:
        self.profile = self._measured = measured
        self._factors = [1.0, 1.0]
        self._chunked, self._bare = ProfileDrift(), ProfileDrift()

    def observe(self, batch: Batch, took_s: float) -> None:
        """Compare a step, whose tokens count as computed, with what was measured."""
        context = sum(single.computed for single in batch.singles)
        if batch.chunks:
            work = sum(
                attention_work(chunk.count, chunk.sequence.computed - chunk.count) for chunk in batch.chunks
            )
            said_s = float(self._measured.mixed.seconds(batch.tokens, work, context))
            self._chunked.observe(said_s, took_s)
        else:
            self._bare.observe(float(self._measured.step.seconds(len(batch.singles), context)), took_s)
        factors = [drift.ratio or 1.0 for drift in (self._chunked, self._bare)]
        off = (max(now / used, used / now) for now, used in zip(factors, self._factors, strict=True))
        if max(off) > NOTICED:
            self._factors = factors
            chunked, bare = factors
            mixed = self._measured.scaled(chunked, chunked).mixed
            self.profile = replace(self._measured.scaled(chunked, bare), mixed=mixed)
