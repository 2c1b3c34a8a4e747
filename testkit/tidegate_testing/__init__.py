"""Public kit for tests: a clock that is set by hand, and builders with plain defaults."""

from tidegate_testing.builders import FAST, REFERENCE, VirtualClock, cluster, instance, profile, request

__all__ = ["FAST", "REFERENCE", "VirtualClock", "cluster", "instance", "profile", "request"]
