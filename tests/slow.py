"""How long the slow tests take."""

import os


def examples(most: int) -> int:
    """Return how many examples a slow property test draws: ``most``, or the share ``SLOW_SHARE`` of it."""
    return max(1, int(most * float(os.environ.get("SLOW_SHARE", "1"))))
