"""The simulator: the same ledger, systems and policies as the gateway, in virtual time."""

from tidegate.sim.driver import simulate
from tidegate.sim.results import InstanceUse, SimResult, SimRun
from tidegate.sim.settings import EngineSettings, Replica, SimSettings

__all__ = ["EngineSettings", "InstanceUse", "Replica", "SimResult", "SimRun", "SimSettings", "simulate"]
