"""LENGTHS: how many tokens each request will still generate.

A source predicts; the control plane owns one, feeds it what happens, and hands its predictions to policies.
"""

from tidegate.core.prediction import Prediction
from tidegate.signals.lengths.source import LengthSource, Remaining

__all__ = ["LengthSource", "Prediction", "Remaining"]
