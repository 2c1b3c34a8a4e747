"""The line an engine prints when it is ready, and the profile its samples give."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Instance
from tidegate.costs.fitting import PrefillSample, StepSample, fit_profile
from tidegate.costs.forms import TransferCost
from tidegate.costs.profile import Profile

log = logging.getLogger(__name__)

SAME_HOST = TransferCost(latency_s=0.001, bytes_per_s=1e9)
"""KV transfer between processes of one machine, which read each other's memory.

Measured: a pull of 1 MiB takes about 2 ms. How that divides into latency and bandwidth is assumed.
"""


class _Prefill(BaseModel):
    kind: Literal["prefill"]
    new_tokens: int
    cached_tokens: int
    seconds: float


class _Step(BaseModel):
    kind: Literal["step"]
    batch: int
    context_tokens: int
    seconds: float


class Ready(BaseModel):
    """An engine's announcement. Fields it has beyond these are ignored."""

    event: Literal["ready"]
    port: int = Field(gt=0, le=65535)
    engine_id: str
    pid: int
    model: str
    max_model_len: int = Field(gt=0)
    kv_capacity_tokens: int = Field(gt=0)
    block_tokens: int = Field(gt=0)
    kv_bytes_per_token: int = Field(ge=0)
    profile_samples: list[Annotated[_Prefill | _Step, Field(discriminator="kind")]] = []

    @classmethod
    def parse(cls, line: str) -> Ready | None:
        """Read one line of output; None when it is not an announcement.

        Raises ConfigError when it is one that lacks a field or has a wrong value.
        """
        if not line.startswith("{") or '"ready"' not in line:
            return None
        try:
            return cls.model_validate_json(line)
        except ValidationError as error:
            raise ConfigError(f"the engine's ready line is malformed: {faults_in(error)}") from None

    def instance(self, instance_id: str) -> Instance:
        """Return the instance this announcement describes, under the fleet's name for it."""
        return Instance(
            id=instance_id,
            kv_capacity_tokens=self.kv_capacity_tokens,
            max_model_len=self.max_model_len,
            block_tokens=self.block_tokens,
            kv_bytes_per_token=self.kv_bytes_per_token,
        )


def faults_in(error: ValidationError) -> str:
    """Return what is wrong with an announcement, fields by name."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def pooled_profile(ready: Sequence[Ready], device: str) -> Profile | None:
    """Fit one profile to the samples of engines that are alike; None, with a warning, when it cannot be.

    Every point is measured once per engine, all of them at the same time on one machine: the median
    over the engines keeps a neighbour's noise out of the fit, and equal engines get equal profiles,
    so that no policy prefers one of them for an accident of its start.
    """
    points: dict[tuple[str, int, int], list[float]] = {}
    for sample in (s for r in ready for s in r.profile_samples):
        if isinstance(sample, _Prefill):
            point = ("prefill", sample.new_tokens, sample.cached_tokens)
        else:
            point = ("step", sample.batch, sample.context_tokens)
        points.setdefault(point, []).append(sample.seconds)
    medians = [(kind, x, y, median(seconds)) for (kind, x, y), seconds in points.items()]
    try:
        return fit_profile(
            f"{device}/{ready[0].model}" if ready else device,
            [PrefillSample(x, y, seconds) for kind, x, y, seconds in medians if kind == "prefill"],
            [StepSample(x, y, seconds) for kind, x, y, seconds in medians if kind == "step"],
            SAME_HOST,
            source="measured by the engines at start",
        )
    except ConfigError as error:
        log.warning("the instances have no measured profile: %s", error)
        return None
