"""``tidegate`` holds still at constant load, and is back soon after a spike."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.experiments.run import run_once
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.sim import SimRun, SimSettings
from tidegate.workloads.choice import WorkloadChoice


def run_of(choice: WorkloadChoice, profile: str, instances: int, slo: Slo) -> SimRun:
    fleet = SimulatedFleet(((packaged_profile(profile), instances),))
    return run_once(Setting(choice, fleet, "tidegate", None, SimSettings(slo=slo))).run


@pytest.mark.slow
def test_labels_hold_still_at_constant_load() -> None:
    """Of long prompts the arithmetic promises more of a split than the decodes have room for."""
    long = WorkloadChoice(
        poisson=4.5,
        duration_s=3600.0,
        input_tokens="lognormal:15000:0.8",
        output_tokens="lognormal:150:1",
    )
    run = run_of(long, "h100_sxm/llama-3.1-8b", 4, Slo(2.0, 0.05))
    flips_s = np.array([flip.at_s for flip in run.timeline.flips])
    assert (flips_s < 600.0).any(), "nothing was split, so nothing could flap"
    assert np.count_nonzero(flips_s >= 600.0) <= 1
    assert run.attained > 0.95 * len(run.requests)


@pytest.mark.slow
def test_requests_attain_again_soon_after_a_spike() -> None:
    """Ten times the load for 5 s is more than the fleet serves, and leaves prompts that are late already."""
    spikes = WorkloadChoice(
        bursts="20:55,200:5",
        duration_s=175.0,
        input_tokens="lognormal:1000:1",
        output_tokens="lognormal:200:1",
    )
    run = run_of(spikes, "h100_sxm/llama-3.1-70b/tp4", 8, Slo(1.0, 0.05))
    assert run.flips, "with all instances doing both a chunk of late prompts is never long"
    since_s = run.requests.arrival_s % 60.0
    later = run.requests.arrival_s > 60.0
    spike, soon, after = (
        run.requests.attained[later & (since_s >= low) & (since_s < high)]
        for low, high in ((55.0, 60.0), (0.0, 5.0), (10.0, 55.0))
    )
    assert spike.mean() < 0.9
    assert soon.mean() > 0.95
    assert after.mean() > 0.99
