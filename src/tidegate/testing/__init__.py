"""Public kit for tests: a clock that is set by hand, and builders with plain defaults."""

from tidegate.testing.builders import REFERENCE, cluster, instance, profile, request
from tidegate.testing.clock import VirtualClock

__all__ = ["REFERENCE", "VirtualClock", "cluster", "instance", "profile", "request"]
