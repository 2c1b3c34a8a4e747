"""What the steps of an engine take: stretched to a given pace, and compared with its profile."""

from __future__ import annotations

import time
from dataclasses import replace

from tidegate.core.clock import Clock
from tidegate.costs.drift import ProfileDrift
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import Profile
from tidegate.engines.embedded.model import Batch

NOTICED = 1.05
"""Predictions follow where steps are off by more than this factor (ours)."""


def step_seconds(profile: Profile, batch: Batch) -> float:
    """Return what a step takes by a profile; the tokens of ``batch`` count as computed."""
    context = sum(single.computed for single in batch.singles)
    if not batch.chunks:
        return float(profile.step.seconds(len(batch.singles), context))
    work = sum(attention_work(chunk.count, chunk.sequence.computed - chunk.count) for chunk in batch.chunks)
    return float(profile.mixed.seconds(batch.tokens, work, context))


class Pace:
    """Stretches steps to what ``profile`` says; without one they take what they take.

    Engines that share cores slow each other down by whatever the others do. At a pace that all of them can
    keep a step takes the same time whatever they do, as on hardware of its own. What follows in a turn of the
    engine, delivering tokens above all, comes on top.
    """

    def __init__(self, profile: Profile | None, clock: Clock) -> None:
        self._profile = profile
        self._clock = clock

    def keep(self, batch: Batch, began_s: float) -> None:
        """Sleep until the step of ``batch``, whose tokens count as computed, has taken what it should."""
        if self._profile is not None:
            time.sleep(max(0.0, began_s + step_seconds(self._profile, batch) - self._clock.now()))


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
        drift = self._chunked if batch.chunks else self._bare
        drift.observe(step_seconds(self._measured, batch), took_s)
        factors = [drift.ratio or 1.0 for drift in (self._chunked, self._bare)]
        off = (max(now / used, used / now) for now, used in zip(factors, self._factors, strict=True))
        if max(off) > NOTICED:
            self._factors = factors
            chunked, bare = factors
            mixed = self._measured.scaled(chunked, chunked).mixed
            self.profile = replace(self._measured.scaled(chunked, bare), mixed=mixed)
