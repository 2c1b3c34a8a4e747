"""Offer load to an OpenAI-compatible endpoint and score the answers."""

from tidegate.bench.run import BenchRun, bench, run_bench
from tidegate.bench.settings import BenchSettings, PromptForm

__all__ = ["BenchRun", "BenchSettings", "PromptForm", "bench", "run_bench"]
