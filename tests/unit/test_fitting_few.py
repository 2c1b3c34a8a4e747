"""However few samples there are, a profile comes of them, and says so."""

from __future__ import annotations

import pytest

from tidegate.costs.fitting import PrefillSample, StepSample, fit_few
from tidegate.costs.forms import TransferCost
from tidegate.costs.roofline import Shape, nominal_profile

LINK = TransferCost(0.001, 1e9)
PRIOR = nominal_profile("cpu/m", "cpu", Shape(576, 30, 9, 3, 64, 1536, 49152, 4.0, 4.0))


def truth(factor: float) -> tuple[list[PrefillSample], list[StepSample]]:
    profile = PRIOR.scaled(factor, 2 * factor)
    prefills = [(16, 0), (64, 0), (32, 1024), (256, 0)]
    steps = [(1, 66), (8, 528), (4, 2056)]
    return (
        [PrefillSample(new, cached, profile.prefill_s(new, cached)) for new, cached in prefills],
        [StepSample(b, c, float(profile.step.seconds(b, c))) for b, c in steps],
    )


@pytest.mark.parametrize(("prefills", "steps"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 3)])
def test_too_few_samples_scale_the_prior(prefills: int, steps: int) -> None:
    p, s = truth(3.0)
    profile, lacking = fit_few("cpu/m", p[:prefills], s[:steps], LINK, PRIOR, source="here")
    expected = PRIOR.scaled(3.0, 6.0)
    assert profile.prefill_s(100, 50) == pytest.approx(expected.prefill_s(100, 50), rel=0.25)
    assert float(profile.step.seconds(4, 400)) == pytest.approx(
        float(expected.step.seconds(4, 400)), rel=0.02
    )
    assert ("prefill point" in lacking) == (prefills < 3)
    assert ("step point" in lacking) == (steps < 3)
    assert lacking in profile.source


def test_one_step_scales_both_forms_and_nothing_keeps_the_prior() -> None:
    p, _ = truth(3.0)
    profile, _ = fit_few("m", p[:1], [], LINK, PRIOR, source="here")
    assert float(profile.step.seconds(4, 400)) == pytest.approx(3 * float(PRIOR.step.seconds(4, 400)))
    profile, lacking = fit_few("m", [], [], LINK, PRIOR, source="here")
    assert profile.prefill == PRIOR.prefill
    assert lacking.startswith("0 prefill points, 0 step points")


def test_samples_of_one_composition_do_not_pass_for_three() -> None:
    """Three steps of one request that differ by a token of context say nothing about context."""
    p, _ = truth(1.0)
    near = [StepSample(1, 65 + n, seconds) for n, seconds in enumerate((0.11, 0.12, 0.13))]
    profile, lacking = fit_few("m", p, near, LINK, PRIOR, source="here")
    assert "3 step points" in lacking
    assert float(profile.step.seconds(1, 2000)) < 0.3


def test_enough_samples_are_fitted_as_ever() -> None:
    p, s = truth(1.0)
    profile, lacking = fit_few("m", p, s, LINK, PRIOR, source="here")
    assert lacking == ""
    assert profile.errors and profile.errors[0][2] < 0.2
