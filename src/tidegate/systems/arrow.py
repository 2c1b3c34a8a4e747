"""Arrow, in both versions: stateless instances whose label follows the load."""

from __future__ import annotations

from tidegate.policies.arrow import ArrowPlacement
from tidegate.policies.arrow_lending import Lending
from tidegate.policies.arrow_monitor import ArrowMonitor
from tidegate.policies.arrow_v1 import ArrowV1Monitor, ArrowV1Placement
from tidegate.systems.registry import SYSTEMS, SystemOptions
from tidegate.systems.system import System


@SYSTEMS.register("arrow")
def arrow(options: SystemOptions) -> System:
    """Arrow v2 (arXiv 2505.11916v2), where pools lend by what they would be left with (ours)."""
    return _arrow("arrow", "SLO-aware placement with role flips", options, Lending())


@SYSTEMS.register("arrow-v2")
def arrow_v2(options: SystemOptions) -> System:
    """Arrow v2 (arXiv 2505.11916v2) as published: placement that flips inline, and a monitor for decode."""
    return _arrow("arrow-v2", "Arrow as published, version 2", options, None)


@SYSTEMS.register("arrow-v1")
def arrow_v1(options: SystemOptions) -> System:
    """Arrow v1 (xLLM report, section 3.2): four elastic pools and a threshold monitor."""
    placement = ArrowV1Placement()
    monitor = ArrowV1Monitor(slo=options.slo, period_s=options.tick_s)
    return System(
        name="arrow-v1",
        summary="four elastic pools",
        roles=options.roles(),
        prefill=placement,
        decode=placement,
        controllers=(monitor,),
        window_s=options.tick_s,
    )


def _arrow(name: str, summary: str, options: SystemOptions, lending: Lending | None) -> System:
    placement = ArrowPlacement(slo=options.slo, lending=lending)
    monitor = ArrowMonitor(slo=options.slo, period_s=options.tick_s, lending=lending)
    return System(
        name=name,
        summary=summary,
        roles=options.roles(),
        prefill=placement,
        decode=placement,
        controllers=(monitor,),
        window_s=options.tick_s,
    )
