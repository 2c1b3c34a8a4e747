"""Where the program starts: its own imports take a moment, in which a Ctrl-C ends it as quietly as later."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from tidegate.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)  # as ``terminal.INTERRUPTED``, whose module may be what was being loaded
    run()
