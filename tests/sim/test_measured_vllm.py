"""The simulator tells what real vLLM servers did: means within the stated goals.

The run of two GPUs only pins a calibration: the all-reduce of its profile was chosen after seeing it.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARK: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "measured_vllm.py"))
RUNS = {
    measured.run: measured
    for measured in BENCHMARK["read_runs"](Path(__file__).parent / "measured" / "vllm019_requests.csv.gz")
}


@pytest.mark.parametrize("run", BENCHMARK["SETUPS"])
def test_the_means_of_a_measured_run(run: str) -> None:
    measured = RUNS[run]
    result = BENCHMARK["simulated"](measured, BENCHMARK["SETUPS"][run])
    for name, goal in BENCHMARK["GOALS"].items():
        assert np.nanmean(result[name]) == pytest.approx(np.nanmean(measured.seconds[name]), rel=goal), name
