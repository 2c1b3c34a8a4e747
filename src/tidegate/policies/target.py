"""How a fleet gets to a target split: which instance flips, which starts, which drains."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tidegate.core.decision import AddInstance, Drain, Flip, SetTarget
from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Snapshot


def steps_to_target(
    snapshot: Snapshot, target: SetTarget, starting: Mapping[Role, int]
) -> tuple[Flip | AddInstance | Drain, ...]:
    """Return the actions after which the fleet has ``target``'s split; none where it has.

    ``starting`` counts the instances that are on their way, by the label they will have. Flips come first:
    they cost nothing. What a flip cannot make up for is added or drained, and removed once it is empty. Of
    the instances that could change, the one goes first that still holds work of the role it changes to, then
    the one with the least work of the role it gives up (Arrow v2, Algorithm 3). MIXED instances stay.
    """
    wanted = {Role.PREFILL: target.n_prefill, Role.DECODE: target.n_decode}
    cheapest = {role: _cheapest_first(snapshot, role) for role in wanted}
    lacking = {
        role: count - int(np.count_nonzero(snapshot.labelled(role))) - starting.get(role, 0)
        for role, count in wanted.items()
    }
    steps: list[Flip | AddInstance | Drain] = []
    for to, source in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        while lacking[to] > 0 > lacking[source] and cheapest[source]:
            steps.append(Flip(cheapest[source].pop(0), to, "target"))
            lacking[to] -= 1
            lacking[source] += 1
    for role, count in lacking.items():
        steps += [AddInstance(role, target.reason)] * max(0, count)
        steps += [Drain(name, True, target.reason) for name in cheapest[role][: max(0, -count)]]
    return tuple(steps)


def _cheapest_first(snapshot: Snapshot, role: Role) -> list[str]:
    """Return the flippable instances of a label, the one that is cheapest to take away first."""
    if role is Role.PREFILL:
        other, work = snapshot.decode_requests, snapshot.prefill_queue_s
    else:
        other, work = snapshot.prefill_requests, snapshot.decode_tokens
    among = np.nonzero(snapshot.labelled(role) & snapshot.flippable)[0]
    order = np.lexsort((work[among], other[among] == 0))
    return [snapshot.ids[column] for column in among[order]]
