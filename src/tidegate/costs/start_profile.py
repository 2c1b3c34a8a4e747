"""The profile of embedded engines, from what they measure of themselves at their start."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import TypeAdapter

from tidegate.core.errors import ConfigError
from tidegate.costs.fitting import PrefillSample, StepSample, fit_few
from tidegate.costs.forms import TransferCost
from tidegate.costs.profile import Profile
from tidegate.costs.roofline import Shape, nominal_profile

log = logging.getLogger(__name__)

SAME_HOST = TransferCost(latency_s=0.001, bytes_per_s=1e9)
"""KV transfer between processes of one machine, which read each other's memory.

Measured: a pull of 1 MiB takes about 2 ms. How that divides into latency and bandwidth is assumed.
"""
SMALL = Shape(576, 30, 9, 3, 64, 1536, 49152, 4.0, 4.0)
_SAMPLES = TypeAdapter(list[PrefillSample | StepSample])


def as_samples(measured: Iterable[dict[str, Any]]) -> list[PrefillSample | StepSample]:
    """Return what an engine measured, as it announces it, as samples."""
    return _SAMPLES.validate_python(list(measured))


def pooled_profile(name: str, samples: Iterable[PrefillSample | StepSample], prior: Profile) -> Profile:
    """Fit one profile to the samples of engines that are alike; too few of them scale ``prior``, with a
    warning.

    All engines measure every point at the same time on one machine: the median over them keeps a neighbour's
    noise out of the fit, and equal profiles keep policies from preferring one engine by accident.
    """
    points: dict[PrefillSample | StepSample, list[float]] = {}
    for sample in samples:
        points.setdefault(replace(sample, seconds=0.0), []).append(sample.seconds)
    medians = [replace(point, seconds=median(seconds)) for point, seconds in points.items()]
    profile, lacking = fit_few(
        name,
        [sample for sample in medians if isinstance(sample, PrefillSample)],
        [sample for sample in medians if isinstance(sample, StepSample)],
        SAME_HOST,
        prior,
        source="measured by the engines at start",
    )
    if lacking:
        log.warning("the engines' measurement at start was cut short: %s; requests refine it", lacking)
    return profile


def start_profile(
    name: str, device: str, folder: Path, samples: Iterable[PrefillSample | StepSample]
) -> Profile:
    """Return the profile of engines on ``device`` that serve the model in ``folder``: ``pooled_profile`` of
    their samples beside what the model's size says."""
    prior = nominal_profile(name, device.partition(":")[0], shape_of(folder))
    return pooled_profile(name, samples, prior)


def shape_of(folder: Path) -> Shape:
    """Return the shape of the model in a folder, or that of a small one where its file does not say."""
    try:
        return Shape.from_config(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, ConfigError):
        return SMALL
