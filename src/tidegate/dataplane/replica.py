"""What a simulated instance is made of, and fleets written as ``gpu/model[/tpN][@engine]:N``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Instance
from tidegate.core.notation import FleetRange, parse_ranged
from tidegate.costs.forms import TransferCost
from tidegate.costs.library import PackagedProfile
from tidegate.costs.named_profile import load_profile
from tidegate.costs.profile import Profile
from tidegate.policies.chunks import ChunkBudget, known_budget

BLOCK_TOKENS = 16
"""KV block size of such a fleet: vLLM's default."""
MOST_INSTANCES = 1024
MOST_CONTEXT_TOKENS = 131_072
"""The longest context of a fleet built from a packaged profile: that of the packaged models."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an instance batches, and what a step costs beside the model.

    ``max_batch_tokens`` and ``max_num_seqs`` are vLLM's (its defaults for serving on a large GPU); ``host_s``
    is added to every step; ``lease_s`` is how long KV waits for a decode that does not come for it (that of
    the embedded engine). ``reserve`` is the share of blocks that admission leaves free while others run
    (the embedded engine's; vLLM calls it watermark and has 0). With ``prefix_cache``, KV of known tokens is
    found again.
    """

    max_batch_tokens: int = 8192
    max_num_seqs: int = 1024
    host_s: float = 0.0
    lease_s: float = 30.0
    reserve: float = 0.01
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if self.max_batch_tokens < 1 or self.max_num_seqs < 1:
            raise ConfigError("a batch needs room for at least one token of one sequence")
        if not (0 <= self.host_s < float("inf") and self.lease_s > 0 and 0 <= self.reserve < 1):
            raise ConfigError("an engine's host time, lease and reserve are out of range")


@dataclass(frozen=True, slots=True)
class Replica:
    """An instance, what its steps cost, and how it batches.

    KV comes to it over ``link``, shared with all that name the same; an empty name is a link of its own.
    ``node`` names the machine that it is in; what comes from another node costs ``inter_node`` instead of the
    profile's transfer, on a port of its own. None: all comes alike.
    """

    instance: Instance
    profile: Profile
    engine: EngineSettings = field(default_factory=EngineSettings)
    link: str = ""
    node: str = ""
    inter_node: TransferCost | None = None

    def __post_init__(self) -> None:
        held, context = self.instance.kv_capacity_tokens, self.instance.max_model_len
        blocks = held // self.instance.block_tokens
        if blocks * self.instance.block_tokens < context:
            raise ConfigError(
                f"instance {self.instance.id}: its KV holds {held} tokens, less than one context of {context}"
            )

    def with_known_budget(self, chunks: ChunkBudget | None) -> Replica:
        """Return it with an instance that says the engine's budget of a step, where ``chunks`` keep to it."""
        step_tokens = known_budget(chunks, self.engine.max_batch_tokens)
        return replace(self, instance=replace(self.instance, step_tokens=step_tokens))


def replicas_of(
    packaged: PackagedProfile,
    count: int,
    *,
    engine: EngineSettings | None = None,
    kv_tokens: int | None = None,
    instances_per_node: int = 8,
) -> list[Replica]:
    """Return ``count`` equal replicas ``i0``, ``i1``, ... of a packaged profile, node after node.

    ``kv_tokens`` replaces the profile's rough KV capacity. Raises ConfigError for a fleet without instances.
    """
    if count < 1 or instances_per_node < 1:
        raise ConfigError("a fleet has at least one instance, and a node holds at least one")
    capacity = packaged.kv_capacity_tokens if kv_tokens is None else kv_tokens
    whole = capacity // BLOCK_TOKENS * BLOCK_TOKENS
    return [
        Replica(
            Instance(
                f"i{index}",
                kv_capacity_tokens=capacity,
                max_model_len=min(MOST_CONTEXT_TOKENS, whole),
                block_tokens=BLOCK_TOKENS,
                kv_bytes_per_token=packaged.kv_bytes_per_token,
            ),
            packaged.profile,
            engine or EngineSettings(),
            node=f"n{index // instances_per_node}",
            inter_node=packaged.inter_node,
        )
        for index in range(count)
    ]


@dataclass(frozen=True, slots=True)
class Group:
    """``count`` equal instances of one profile, and at most ``spares`` more.

    ``chunk_tokens`` replaces the fleet's budget of a step. ``named`` is the profile's name or file as given.
    """

    packaged: PackagedProfile
    count: int
    spares: int = 0
    chunk_tokens: int | None = None
    named: str = ""

    @classmethod
    def parse(cls, text: str) -> Group:
        """Read ``NAME:N``, or ``NAME:A..B`` of a group that may grow; ``NAME``, a packaged profile or the
        file of a measured one, is one instance.

        Raises ConfigError for an unknown profile, naming near ones, and for a count that is none.
        """
        try:
            name, given = parse_ranged(text)
        except ValueError:
            name, given = ":", None
        count, most = given or FleetRange(1, 1)
        if ":" in name or most > MOST_INSTANCES:
            raise ConfigError(
                f"{text!r}: expected PROFILE:N with 1 to {MOST_INSTANCES} instances, "
                "as in h100_sxm/llama-3.1-8b:8, or PROFILE:A..B"
            )
        return cls(load_profile(name), count, most - count, named=name)


def parse_groups(texts: Sequence[str]) -> list[Group]:
    """Read the groups of one fleet. Raises ConfigError for none at all, for several models, and where
    another than the last one may grow."""
    groups = [Group.parse(text) for text in texts]
    for group in groups[:-1]:
        if group.spares:
            raise ConfigError(f"{group.packaged.name} has a range: only the last group of a fleet can grow")
    models = sorted({group.packaged.model for group in groups})
    if len(models) != 1:
        raise ConfigError(f"a fleet serves one model; these profiles are of {' and '.join(models) or 'none'}")
    return groups


def replicas_in(
    groups: Sequence[Group], *, engine: EngineSettings | None = None, kv_tokens: int | None = None
) -> list[Replica]:
    """Return what all groups begin with, ``i0``, ``i1``, ... through all of them; groups share no node.

    ``kv_tokens`` replaces every profile's KV capacity.
    """
    replicas: list[Replica] = []
    for number, group in enumerate(groups):
        own = engine or EngineSettings()
        if group.chunk_tokens is not None:
            own = replace(own, max_batch_tokens=group.chunk_tokens)
        for replica in replicas_of(group.packaged, group.count, engine=own, kv_tokens=kv_tokens):
            instance = replace(replica.instance, id=f"i{len(replicas)}")
            replicas.append(replace(replica, instance=instance, node=f"g{number}{replica.node}"))
    return replicas
