"""The fluid limit of a setting, as a job."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tidegate.experiments.jobs import Job
from tidegate.experiments.setting import Setting
from tidegate.experiments.workload import requests_of


@dataclass(frozen=True, slots=True)
class Limit:
    """The highest mean rate that any schedule could serve at the level, None where there is no bound.

    ``binding`` says in words what sets it.
    """

    limit_rps: float | None
    binding: str


def limit_job(setting: Setting, level: float, max_batch_tokens: int) -> Job:
    """Return the job of finding the limit of the setting's fleet and workload, whoever schedules.

    ``max_batch_tokens`` replaces that of the fleet: the bound is for the largest that anyone uses.
    """
    fleet, slo = setting.fleet, setting.settings.slo
    # Whatever the system is, the limit is the same, and so is its name.
    key = Setting(setting.workload, fleet, "", None, setting.settings).digest(
        kind="limit", level=level, max_batch_tokens=max_batch_tokens
    )
    return Job(key, find_limit, (setting, level, max_batch_tokens), f"limit at {slo}, {100 * level:g} %")


def find_limit(setting: Setting, level: float, max_batch_tokens: int) -> dict[str, Any]:
    """Return ``Limit``'s fields."""
    from tidegate.bound.limit import fluid_limit  # brings a solver along: half a second

    replicas = setting.fleet.replicas()
    found = fluid_limit(
        requests_of(setting.workload),
        [replica.profile for replica in replicas],
        [replica.instance for replica in replicas],
        setting.settings.slo,
        level=level,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=setting.fleet.engine.max_num_seqs,
        host_s=setting.fleet.engine.host_s,
    )
    return asdict(Limit(found.limit_rps, found.binding))
