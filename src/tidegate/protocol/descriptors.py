"""File descriptors of this process: how many there are, and whether a failure is due to their lack."""

from __future__ import annotations

import errno
import os
import resource

WANTED = 2**20
"""More are not asked for (ours)."""
OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""What a connection fails with for reasons of this process or machine."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files as far as the hard one lets, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return WANTED
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (OSError, ValueError):
            pass
    return int(soft)


def is_our_lack(error: OSError) -> bool:
    """Tell whether a connection failed because this process has no descriptor left, whatever it says: looking
    up a name fails with errors of its own."""
    if error.errno in OURS:
        return True
    try:
        os.close(os.dup(2))
    except OSError as now:
        return now.errno in OURS
    return False
