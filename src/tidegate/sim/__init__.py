"""The simulator: the same ledger, systems and policies as the gateway, in virtual time."""

from tidegate.dataplane.replica import EngineSettings, Replica
from tidegate.sim.checks import slo_warnings
from tidegate.sim.driver import simulate
from tidegate.sim.replay import Compared, Replay, Spread, replay_journal
from tidegate.sim.results import InstanceUse, SimRun
from tidegate.sim.settings import SimSettings

__all__ = [
    "Compared",
    "EngineSettings",
    "InstanceUse",
    "Replay",
    "Replica",
    "SimRun",
    "SimSettings",
    "Spread",
    "replay_journal",
    "simulate",
    "slo_warnings",
]
