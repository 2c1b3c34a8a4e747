"""What a process of instances does at its start and end, whichever engine it runs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from typing import Any

import orjson

from tidegate.core.errors import ConfigError


def log_to_stderr(level: str, name: str) -> None:
    """Log from ``level`` on, every line with ``name``."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format=f"%(asctime)s %(levelname)s {name} %(message)s"
    )


def bind(host: str, port: int) -> socket.socket:
    """Take the port without listening: connections are refused until then.

    Raises ConfigError when it cannot be had.
    """
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


def announce(announcement: dict[str, Any], ready_fd: int | None = None) -> None:
    """Write the ready line to ``ready_fd``, or to stdout."""
    line = orjson.dumps(announcement) + b"\n"
    if ready_fd is None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        return
    with os.fdopen(ready_fd, "wb") as target:
        target.write(line)
