"""The simulator: the same ledger, systems and policies as the gateway, in virtual time."""

from tidegate.dataplane.replica import EngineSettings, Replica
from tidegate.sim.loop import simulate
from tidegate.sim.results import InstanceUse, SimRun, slo_warnings
from tidegate.sim.settings import SimSettings

__all__ = [
    "EngineSettings",
    "InstanceUse",
    "Replica",
    "SimRun",
    "SimSettings",
    "simulate",
    "slo_warnings",
]
