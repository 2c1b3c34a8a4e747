"""Measured runs: percentiles, SLO attainment, goodput and reports."""

from tidegate.measure.attainment import Attainment, Goodput, Observation, goodput, score
from tidegate.measure.bench_report import BenchReport, build_bench_report, render_block
from tidegate.measure.percentiles import Summary, summarize
from tidegate.measure.report import RunReport, build_report
from tidegate.measure.results import RequestResult, read_results
from tidegate.measure.tables import render_report

__all__ = [
    "Attainment",
    "BenchReport",
    "Goodput",
    "Observation",
    "RequestResult",
    "RunReport",
    "Summary",
    "build_bench_report",
    "build_report",
    "goodput",
    "read_results",
    "render_block",
    "render_report",
    "score",
    "summarize",
]
