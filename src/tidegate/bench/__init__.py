"""Offer load to an OpenAI-compatible endpoint and score the answers."""

from tidegate.bench.run import BenchRun, Watch, bench, run_bench
from tidegate.bench.settings import BenchSettings, PromptForm
from tidegate.bench.sweep import Load, run_sweep

__all__ = ["BenchRun", "BenchSettings", "Load", "PromptForm", "Watch", "bench", "run_bench", "run_sweep"]
