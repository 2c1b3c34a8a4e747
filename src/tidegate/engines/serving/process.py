"""How a process of instances starts and ends, whichever engine it runs."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from typing import Any

import orjson

from tidegate.core.errors import ConfigError, SetupError
from tidegate.engines.seam import STAGE_MARK
from tidegate.policies.chunks import CHUNKS, FIXED
from tidegate.policies.orders import ORDERS

log = logging.getLogger(__name__)

PARENT_GONE_STATUS = 3
THREAD_DIED_STATUS = 70
_PR_SET_PDEATHSIG = 1


def instance_parser(engine: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that the processes of all engines have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tidegate.engines.{engine}",
        description=description,
        epilog="When ready, one JSON line is written to stdout. The launch secret comes from "
        "TIDEGATE_LAUNCH_SECRET or a file.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address of the HTTP server (default: %(default)s)")
    add(
        "--order",
        choices=ORDERS.names(),
        default="fifo",
        help="who is admitted first among waiting requests (default: %(default)s)",
    )
    add(
        "--chunks",
        choices=CHUNKS.names(),
        default=FIXED.name,
        help="how much of prompts joins the decodes in a step (default: %(default)s)",
    )
    add("--exit-with-parent", action="store_true", help="end when the parent process does")
    add(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="default: %(default)s",
    )
    return parser


def run_process(
    serve: Callable[[], None], log_level: str, name: str, *, with_parent: bool, forked: bool = False
) -> int:
    """Run ``serve`` and return the exit status: 0 at its end, 2 for a wrong setup. Every line of the log has
    ``name``; ``with_parent`` ends the process when its parent does, by stdin alone if ``forked``."""
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format=f"%(asctime)s %(levelname)s {name} %(message)s"
    )
    if with_parent:
        exit_with_parent(by_kernel=not forked)
    try:
        serve()
    except SetupError as error:
        log.error("%s", error.message)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def bind(host: str, port: int) -> socket.socket:
    """Bind without listening, so that connections are refused until then. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot bind {host}:{port}: {error.strerror}") from None
    return listener


def stop_signal() -> asyncio.Future[None]:
    """Return a future that the first SIGTERM or SIGINT resolves; the second one ends the process."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if stop.done():
            os._exit(1)
        stop.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


def tell_stage(stage: str) -> None:
    """Say on stdout, to the fleet that started this process, how far its start is."""
    sys.stdout.write(f"{STAGE_MARK}{stage}\n")
    sys.stdout.flush()


def announce(announcement: dict[str, Any], ready_fd: int | None = None) -> None:
    """Write the ready line to ``ready_fd``, or to stdout."""
    line = orjson.dumps(announcement) + b"\n"
    if ready_fd is None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        return
    with os.fdopen(ready_fd, "wb") as target:
        target.write(line)


def exit_with_parent(*, by_kernel: bool = True) -> None:
    """End the process when its parent does. On Linux the kernel kills it when the thread that started it
    ends, unless ``by_kernel`` is false. Anywhere, a stdin that is a pipe or socket ends it at end of file,
    which also covers a parent that died before this call."""
    if by_kernel and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        threading.Thread(target=_await_end_of_stdin, name="parent-watch", daemon=True).start()


def exit_when_a_thread_dies(name: str) -> None:
    """End the process when an exception escapes the thread called ``name``; others are logged. A server whose
    compute thread is gone would accept requests and never answer."""

    def hook(args: threading.ExceptHookArgs) -> None:
        thread = args.thread.name if args.thread else "?"
        log.critical("thread %s died", thread, exc_info=args.exc_value)
        if thread == name:
            logging.shutdown()
            os._exit(THREAD_DIED_STATUS)

    threading.excepthook = hook


def _await_end_of_stdin() -> None:
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass
    os._exit(PARENT_GONE_STATUS)
