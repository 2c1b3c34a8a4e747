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

from tidegate.core.errors import SetupError
from tidegate.dataplane.replica import EngineSettings, Replica, parse_groups, replicas_in
from tidegate.engines.emulated.growth import GrowthServer
from tidegate.engines.emulated.instances import EmulatedInstances
from tidegate.engines.serving.lifetime import exit_with_parent
from tidegate.engines.serving.process import announce, bind, log_to_stderr, stop_signal
from tidegate.engines.serving.secret import API_KEY_ENV, LaunchSecret
from tidegate.policies.order import ORDERS, make_order

log = logging.getLogger("tidegate.engines.emulated")

GRACE_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the instances; return the exit status: 0 after SIGTERM, 2 for a wrong setup."""
    options = _parser().parse_args(argv)
    log_to_stderr(options.log_level, "emulated")
    if options.exit_with_parent:
        exit_with_parent()
    try:
        secret = LaunchSecret.from_environment(os.environ)
        api_key = os.environ.pop(API_KEY_ENV, "")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(options, secret, api_key))
    except SetupError as error:
        log.error("%s", error.message)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


async def _serve(options: argparse.Namespace, secret: LaunchSecret, api_key: str) -> None:
    groups = parse_groups(options.groups)
    engine = EngineSettings(
        max_batch_tokens=options.max_batch_tokens, host_s=options.host_s, lease_s=options.lease_s
    )
    replicas = replicas_in(groups, engine=engine)
    instances = EmulatedInstances(
        replicas,
        groups[0].packaged.model,
        secret,
        api_key=api_key,
        order=make_order(options.order),
        front_s=options.front_s,
    )
    stop = stop_signal()
    # Requests make no cycles worth hunting for, and a full collection would stall every stream.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    await instances.start([bind(options.host, 0) for _ in replicas])

    def one_more() -> Replica:
        groups[-1] = replace(groups[-1], count=groups[-1].count + 1)
        return replicas_in(groups, engine=engine)[-1]

    growth = GrowthServer(instances, secret, one_more, partial(bind, options.host, 0))
    announce(instances.announcement() | {"port": await growth.start()})
    await stop
    log.info("stopping")
    await growth.stop()
    await instances.stop(GRACE_S)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tidegate.engines.emulated",
        description="Serve made-up answers in vLLM's HTTP dialect, at the pace of measured GPUs.",
        epilog="When ready, one JSON line is written to stdout. The launch secret comes from "
        "TIDEGATE_LAUNCH_SECRET or a file.",
    )
    defaults = EngineSettings()
    add = parser.add_argument
    add("groups", nargs="+", metavar="PROFILE:N", help="packaged profile and number of instances")
    add("--host", default="127.0.0.1", help="address of the HTTP servers (default: %(default)s)")
    add("--max-batch-tokens", type=int, default=defaults.max_batch_tokens, metavar="TOKENS")
    add("--host-s", type=float, default=defaults.host_s, metavar="S", help="host time of a step")
    add("--front-s", type=float, default=0.0, metavar="S", help="front-end time of a leg, beside HTTP's own")
    add("--lease-s", type=float, default=defaults.lease_s, metavar="S")
    add("--order", choices=ORDERS.names(), default="fifo")
    add("--exit-with-parent", action="store_true", help="end when the parent process does")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser


if __name__ == "__main__":
    sys.exit(main())
