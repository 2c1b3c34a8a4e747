"""What holds for every test."""

from __future__ import annotations

from importlib.util import find_spec

from hypothesis import settings

# How long an example takes depends on the machine and on what else it runs: no test fails for that.
settings.register_profile("tidegate", deadline=None)
settings.load_profile("tidegate")

# The clients have an environment of their own (`make test-clients`).
collect_ignore = [] if find_spec("openai") else ["clients"]
