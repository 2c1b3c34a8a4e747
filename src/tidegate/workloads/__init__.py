"""Request traces: read, generate, transform, and turn into prompts."""

from tidegate.workloads.arrivals import ArrivalProcess, Bursts, Gamma, Poisson
from tidegate.workloads.generate import arrival_times_s, generate, resample
from tidegate.workloads.prompts import TokenPrompts, WordPrompts
from tidegate.workloads.readers import is_timed, read_trace, read_untimed
from tidegate.workloads.source import sample_names
from tidegate.workloads.token_counts import Fixed, Lognormal, TokenCounts, Uniform, parse_token_counts
from tidegate.workloads.trace import TraceRecord
from tidegate.workloads.transform import limit, retime, scale_rate, scale_tokens, schedule_sessions, window

__all__ = [
    "ArrivalProcess",
    "Bursts",
    "Fixed",
    "Gamma",
    "Lognormal",
    "Poisson",
    "TokenCounts",
    "TokenPrompts",
    "TraceRecord",
    "Uniform",
    "WordPrompts",
    "arrival_times_s",
    "generate",
    "is_timed",
    "limit",
    "parse_token_counts",
    "read_trace",
    "read_untimed",
    "resample",
    "retime",
    "sample_names",
    "scale_rate",
    "scale_tokens",
    "schedule_sessions",
    "window",
]
