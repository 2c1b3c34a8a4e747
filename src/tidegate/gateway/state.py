"""What the gateway tells about itself."""

from __future__ import annotations

from typing import Any

from tidegate.core.instance import Role
from tidegate.gateway.dispatcher import Dispatcher
from tidegate.policies.arrow.pools_v1 import Pools


def models_object(dispatcher: Dispatcher) -> dict[str, Any]:
    """Return the body of ``/v1/models``."""
    served: dict[str, int] = {}
    for upstream in dispatcher.upstreams.values():
        member = upstream.member
        served[member.model] = max(served.get(member.model, 0), member.instance.max_model_len)
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "tidegate", "max_model_len": length}
            for name, length in sorted(served.items())
        ],
    }


def state_object(dispatcher: Dispatcher) -> dict[str, Any]:
    """Return the body of ``/tidegate/state``."""
    snapshot = dispatcher.plane.snapshot(dispatcher.clock.now())
    pools = Pools.of(snapshot)
    instances = []
    for i, name in enumerate(snapshot.ids):
        member = dispatcher.upstreams[name].member
        role = Role(int(snapshot.role[i]))
        flipped_at_s = float(snapshot.flipped_at_s[i])
        instances.append(
            {
                "id": name,
                "role": role.label,
                "pool": pools.name_of(i),
                "url": member.url,
                "kind": member.kind,
                "pid": member.pid,
                "engine_id": member.engine_id,
                "prefill_requests": int(snapshot.prefill_requests[i]),
                "prefill_wait_s": round(float(snapshot.prefill_wait_s[i]), 6),
                "decode_requests": int(snapshot.decode_requests[i]),
                "decode_tokens": int(snapshot.decode_tokens[i]),
                "handoff_tokens": int(snapshot.handoff_tokens[i]),
                "kv_capacity_tokens": int(snapshot.kv_capacity_tokens[i]),
                "mean_gap_s": round(float(snapshot.mean_gap_s[i]), 6),
                "draining": name in dispatcher.plane.membership.draining,
                "drift": dispatcher.drift.ratios(name),
                "flipped_ago_s": None if flipped_at_s < 0 else round(snapshot.at_s - flipped_at_s, 3),
                **dispatcher.loads.state(name, snapshot.at_s),
            }
        )
    return {
        "system": dispatcher.system.name,
        "uptime_s": round(snapshot.at_s - dispatcher.journal.started_s, 3),
        "slo": {"ttft_s": dispatcher.settings.slo.ttft_s, "tpot_s": dispatcher.settings.slo.tpot_s},
        "instances": instances,
        "down": [name for name in dispatcher.plane.membership.labels if name not in dispatcher.upstreams],
        "requests": {"in_flight": len(dispatcher.plane.requests), "held": dispatcher.plane.held_count},
        "flips": dispatcher.flips,
        **({"prompt_tokens": tokens} if (tokens := dispatcher.loads.prompt_tokens()) else {}),
    }
