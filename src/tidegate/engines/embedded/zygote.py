"""``python -m tidegate.engines.embedded.zygote``: a process that has torch imported and forks engines.

It has one thread and computes nothing. Over the socket it is given it takes command lines, each with the
descriptors of stdin, stdout and stderr, and answers with the pid and a pidfd, and once the engine has ended,
with its status. It ends when the socket closes; engines end with their stdin.
"""

from __future__ import annotations

import array
import gc
import importlib
import json
import logging
import os
import random
import selectors
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tidegate.engines.embedded.__main__ import import_engine, main

MESSAGE_BYTES = 1 << 16


def serve(channel: socket.socket, model: Path) -> None:
    """Import what engines need, then fork whatever the channel asks for until it closes."""
    import_engine()
    with suppress(Exception):  # An engine that loads the model finds out what is wrong with it.
        kind = json.loads((model / "config.json").read_text())["model_type"]
        importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    gc.collect()
    gc.freeze()
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    _report_end(channel, selector, key)
                elif not _fork(channel, selector):
                    return


def _fork(channel: socket.socket, selector: selectors.BaseSelector) -> bool:
    """Fork one engine; False when the channel is closed."""
    data, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 3)
    if not data:
        return False
    order = json.loads(data)
    pid = os.fork()
    if not pid:
        inherited = [key.fd for key in selector.get_map().values()]
        selector.close()
        _become_engine(order, descriptors, inherited)
    for descriptor in descriptors:
        os.close(descriptor)
    pidfd = os.pidfd_open(pid)
    selector.register(pidfd, selectors.EVENT_READ, pid)
    answer = json.dumps({"number": order["number"], "pid": pid}).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))
    channel.sendmsg([answer], [rights])
    return True


def _report_end(channel: socket.socket, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    selector.unregister(key.fd)
    os.close(key.fd)
    _, status = os.waitpid(key.data, 0)
    channel.send(json.dumps({"pid": key.data, "status": os.waitstatus_to_exitcode(status)}).encode())


def _become_engine(order: dict[str, Any], descriptors: Sequence[int], inherited: Sequence[int]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        for descriptor in (*descriptors, *inherited):
            os.close(descriptor)
        os.environ.update(order["env"])
        random.seed()
        status = main(order["argv"], forked=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as given:
        serve(given, Path(sys.argv[2]))
