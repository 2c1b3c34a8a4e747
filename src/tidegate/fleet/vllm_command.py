"""How a stock vLLM server is started as a member of a fleet: its KV transfer configuration and its ports."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from typing import Any

from tidegate.core.errors import SetupError

FIRST_PORT, LAST_PORT = 20000, 32000
"""Below Linux's range for outgoing connections, which could take a port between its choice and its use."""
PORTS_PER_SERVER = 16
"""HTTP, bootstrap, and a side channel for each data-parallel engine of a server."""
ATTEMPTS = 200


def nixl_config(
    *,
    engine_id: str = "",
    role: str = "kv_both",
    failure_policy: str = "fail",
    bidirectional: bool = True,
    lease_s: int = 30,
    recompute_threshold: int = 0,
) -> dict[str, Any]:
    """Return vLLM's ``--kv-transfer-config`` for NixlConnector as the gateway wants it.

    ``kv_both``: which phase a server computes is a decision per request. ``fail``: a pull that cannot be made
    fails its request at once, which the gateway repeats; ``recompute`` can hang. ``bidirectional_kv_xfer``:
    a prefill begins with KV that another server's decode made, and an answer brings its handle. ``lease_s``:
    how long KV stays pinned for a pull, in both directions; vLLM keeps that of a decode for 480 s otherwise.
    A recompute threshold of 0 leaves it to the gateway which KV is worth a pull.
    """
    config: dict[str, Any] = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_load_failure_policy": failure_policy,
        "kv_connector_extra_config": {
            "bidirectional_kv_xfer": bidirectional,
            "kv_recompute_threshold": recompute_threshold,
            "kv_lease_duration": lease_s,
            "decoder_kv_blocks_ttl": lease_s,
        },
    }
    return config | ({"engine_id": engine_id} if engine_id else {})


def mooncake_config(*, engine_id: str = "", protocol: str = "") -> dict[str, Any]:
    """Return vLLM's ``--kv-transfer-config`` for MooncakeConnector; ``protocol`` tcp is for machines
    without RDMA."""
    extra = {"kv_connector_extra_config": {"mooncake_protocol": protocol}} if protocol else {}
    config = {
        "kv_connector": "MooncakeConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        **extra,
    }
    return config | ({"engine_id": engine_id} if engine_id else {})


def free_ports(taken: Sequence[int] = (), host: str = "127.0.0.1") -> int:
    """Return the first of ``PORTS_PER_SERVER`` ports in a row that are free on ``host``, away from ``taken``,
    which are first ports of other servers. Raises SetupError when there are none."""
    starts = range(FIRST_PORT, LAST_PORT, PORTS_PER_SERVER)
    for first in random.sample(starts, ATTEMPTS):
        row = range(first, first + PORTS_PER_SERVER)
        if first not in taken and all(_is_free(host, port) for port in row):
            return first
    raise SetupError(f"no {PORTS_PER_SERVER} free ports in a row between {FIRST_PORT} and {LAST_PORT}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
