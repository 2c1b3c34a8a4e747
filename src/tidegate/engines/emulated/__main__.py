"""``python -m tidegate.engines.emulated``: several emulated instances as one process.

Binds a port for each, and one at which instances are added and removed, and says so with one JSON line.
SIGTERM lets running requests finish for a while; a second one ends at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import uvloop

from tidegate.dataplane.replica import EngineSettings, Replica, parse_groups, replicas_in
from tidegate.engines.emulated.instances import EmulatedInstances, FleetServer
from tidegate.engines.serving.process import announce, bind, instance_parser, run_process, stop_signal
from tidegate.engines.serving.secret import API_KEY_ENV, LaunchSecret
from tidegate.policies.chunks import make_chunks
from tidegate.policies.orders import make_order

log = logging.getLogger("tidegate.engines.emulated")

GRACE_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the instances; return the exit status: 0 after SIGTERM, 2 for a wrong setup."""
    options = _parser().parse_args(argv)

    def run() -> None:
        secret = LaunchSecret.from_environment(os.environ)
        api_key = os.environ.pop(API_KEY_ENV, "")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(options, secret, api_key))

    return run_process(run, options.log_level, "emulated", with_parent=options.exit_with_parent)


async def _serve(options: argparse.Namespace, secret: LaunchSecret, api_key: str) -> None:
    groups = parse_groups(options.groups)
    engine = EngineSettings(
        max_batch_tokens=options.max_batch_tokens, host_s=options.host_s, lease_s=options.lease_s
    )
    replicas = replicas_in(groups, engine=engine)
    instances = EmulatedInstances(
        groups[0].packaged.model,
        secret,
        api_key=api_key,
        order=make_order(options.order),
        chunks=make_chunks(options.chunks),
        front_s=options.front_s,
    )
    stop = stop_signal()
    # Requests make no cycles worth hunting for, and a full collection would stall every stream.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    for replica in replicas:
        await instances.add(replica, bind(options.host, 0))

    def one_more() -> Replica:
        groups[-1] = replace(groups[-1], count=groups[-1].count + 1)
        return replicas_in(groups, engine=engine)[-1]

    fleet = FleetServer(instances, secret, one_more, partial(bind, options.host, 0))
    announce(instances.announcement() | {"port": await fleet.start()})
    await stop
    log.info("stopping")
    await fleet.stop()
    await instances.stop(GRACE_S)


def _parser() -> argparse.ArgumentParser:
    parser = instance_parser(
        "emulated", "Serve made-up answers in vLLM's HTTP dialect, at the pace of measured GPUs."
    )
    defaults = EngineSettings()
    add = parser.add_argument
    add("groups", nargs="+", metavar="PROFILE:N", help="packaged profile and number of instances")
    add("--max-batch-tokens", type=int, default=defaults.max_batch_tokens, metavar="TOKENS")
    add("--host-s", type=float, default=defaults.host_s, metavar="S", help="host time of a step")
    add("--front-s", type=float, default=0.0, metavar="S", help="front-end time of a leg, beside HTTP's own")
    add("--lease-s", type=float, default=defaults.lease_s, metavar="S")
    return parser


if __name__ == "__main__":
    sys.exit(main())
