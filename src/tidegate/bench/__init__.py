"""Offer load to an OpenAI-compatible endpoint and score the answers."""

from tidegate.bench.run import BenchRun, bench, run_bench
from tidegate.bench.settings import BenchSettings, PromptForm
from tidegate.bench.workload import WorkloadChoice, load_workload

__all__ = ["BenchRun", "BenchSettings", "PromptForm", "WorkloadChoice", "bench", "load_workload", "run_bench"]
