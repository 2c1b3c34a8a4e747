"""How the process ends: with its parent, or when its compute thread dies."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import stat
import sys
import threading

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
PARENT_GONE_STATUS = 3
THREAD_DIED_STATUS = 70


def exit_with_parent() -> None:
    """End the process when its parent does.

    On Linux the kernel kills it when the thread that started it ends. Anywhere, a stdin that is a
    pipe or socket ends it at end of file, which also covers a parent that died before this call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        threading.Thread(target=_await_end_of_stdin, name="parent-watch", daemon=True).start()


def exit_when_a_thread_dies(name: str) -> None:
    """End the process when an exception escapes the thread called ``name``; others are logged.

    A server whose compute thread is gone would accept requests and never answer.
    """

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
