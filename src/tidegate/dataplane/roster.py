"""A fleet written as ``gpu/model[/tpN][@engine]:N``, group after group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tidegate.core.errors import ConfigError
from tidegate.core.notation import parse_counted
from tidegate.costs.library import PackagedProfile, packaged_profile
from tidegate.dataplane.replica import EngineSettings, Replica, replicas_of

MOST_INSTANCES = 1024


@dataclass(frozen=True, slots=True)
class Group:
    """``count`` equal instances of one packaged profile."""

    packaged: PackagedProfile
    count: int

    @classmethod
    def parse(cls, text: str) -> Group:
        """Read ``NAME:N``; without ``:N`` it is one instance.

        Raises ConfigError for an unknown profile, naming near ones, and for a count that is none.
        """
        name, count = parse_counted(text)
        if ":" in name or not 0 < (1 if count is None else count) <= MOST_INSTANCES:
            raise ConfigError(
                f"{text!r}: expected PROFILE:N with 1 to {MOST_INSTANCES} instances, "
                "as in h100_sxm/llama-3.1-8b:8"
            )
        return cls(packaged_profile(name), count or 1)


def parse_groups(texts: Sequence[str]) -> list[Group]:
    """Read the groups of one fleet. Raises ConfigError for none at all, or for several models."""
    groups = [Group.parse(text) for text in texts]
    models = sorted({group.packaged.model for group in groups})
    if len(models) != 1:
        raise ConfigError(f"a fleet serves one model; these profiles are of {' and '.join(models) or 'none'}")
    return groups


def replicas_in(
    groups: Sequence[Group], *, engine: EngineSettings | None = None, kv_tokens: int | None = None
) -> list[Replica]:
    """Return the replicas of all groups, ``i0``, ``i1``, ... through all of them; groups share no node.

    ``kv_tokens`` replaces every profile's KV capacity.
    """
    replicas: list[Replica] = []
    for number, group in enumerate(groups):
        for replica in replicas_of(group.packaged, group.count, engine=engine, kv_tokens=kv_tokens):
            instance = replace(replica.instance, id=f"i{len(replicas)}")
            replicas.append(replace(replica, instance=instance, node=f"g{number}{replica.node}"))
    return replicas
