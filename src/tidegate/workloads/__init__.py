"""Request traces: read, generate, transform, describe, write, and turn into prompts."""

from tidegate.workloads.arrivals import ArrivalProcess, Bursts, Gamma, Poisson
from tidegate.workloads.choice import WorkloadChoice, load_workload
from tidegate.workloads.combine import concatenate, superpose
from tidegate.workloads.generate import arrival_times_s, generate, resample
from tidegate.workloads.mix import Drift, LinearDrift, SineDrift, drift_mix, parse_drift
from tidegate.workloads.presets import Preset, preset, preset_names
from tidegate.workloads.prompts import TokenPrompts, WordPrompts
from tidegate.workloads.rate_curve import RateCurve, read_rate_curve
from tidegate.workloads.readers import is_timed, open_trace, read_trace, read_untimed
from tidegate.workloads.reseed import reseeded
from tidegate.workloads.reshape import Spike, replicate, spikes, thin
from tidegate.workloads.source import sample_names
from tidegate.workloads.token_counts import (
    Fixed,
    Lognormal,
    Quantiles,
    TokenCounts,
    Uniform,
    parse_token_counts,
)
from tidegate.workloads.trace import TraceRecord, session_of
from tidegate.workloads.trace_statistics import Statistics, cached_tokens, statistics
from tidegate.workloads.transform import (
    by_session,
    limit,
    retime,
    scale_rate,
    scale_tokens,
    schedule_sessions,
    window,
)
from tidegate.workloads.writers import WriteFormat, lost_in, write_trace

__all__ = [
    "ArrivalProcess",
    "Bursts",
    "Drift",
    "Fixed",
    "Gamma",
    "LinearDrift",
    "Lognormal",
    "Poisson",
    "Preset",
    "Quantiles",
    "RateCurve",
    "SineDrift",
    "Spike",
    "Statistics",
    "TokenCounts",
    "TokenPrompts",
    "TraceRecord",
    "Uniform",
    "WordPrompts",
    "WorkloadChoice",
    "WriteFormat",
    "arrival_times_s",
    "by_session",
    "cached_tokens",
    "concatenate",
    "drift_mix",
    "generate",
    "is_timed",
    "limit",
    "load_workload",
    "lost_in",
    "open_trace",
    "parse_drift",
    "parse_token_counts",
    "preset",
    "preset_names",
    "read_rate_curve",
    "read_trace",
    "read_untimed",
    "replicate",
    "resample",
    "reseeded",
    "retime",
    "sample_names",
    "scale_rate",
    "scale_tokens",
    "schedule_sessions",
    "session_of",
    "spikes",
    "statistics",
    "superpose",
    "thin",
    "window",
    "write_trace",
]
