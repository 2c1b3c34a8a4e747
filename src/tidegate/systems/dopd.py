"""Systems that look ahead and size their pools: DOPD, and the planners that it is compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tidegate.policies.baselines import MINIMAL_LOAD
from tidegate.policies.dopd.controller import DopdController
from tidegate.policies.dopd.planner_controllers import (
    Counts,
    PlannerController,
    by_forecast,
    by_load,
    code_counts,
    sla_counts,
)
from tidegate.policies.orders import make_order
from tidegate.policies.protocols import Controller, Signal
from tidegate.systems.builtin import arrow
from tidegate.systems.registry import SYSTEMS, SystemOptions
from tidegate.systems.system import System


@SYSTEMS.register("dopd")
def dopd(options: SystemOptions) -> System:
    """DOPD (arXiv 2511.20982): pools sized ahead of the load, by the optimal ratio with queueing margins, and
    prompts served by length.

    Placements flip nothing: an instance's label has one owner. Prompts are not prefilled on decode instances
    (``LengthPlacement``): the plan leaves those little time to spare.
    """
    controller = DopdController(options.slo, options.fleet, options.start_delay_s, options.advise)
    made = _sized("dopd", "pools sized ahead of the load", options, controller)
    return replace(made, order=make_order("length-aware"))


@SYSTEMS.register("dopd-code")
def dopd_code(options: SystemOptions) -> System:
    """DOPD by the formula of its released code."""
    return _forecast("dopd-code", "DOPD's released formula", options, code_counts)


@SYSTEMS.register("dynamo-load")
def dynamo_load(options: SystemOptions) -> System:
    """Dynamo's load planner: thresholds on the prefill queue and on the decode instances' KV."""
    controller = PlannerController("dynamo-load", by_load(options.fleet), options.fleet)
    return _sized("dynamo-load", "pools sized by thresholds", options, controller)


@SYSTEMS.register("dynamo-sla")
def dynamo_sla(options: SystemOptions) -> System:
    """Dynamo's SLA planner: throughput that is forecast over throughput within the targets."""
    return _forecast("dynamo-sla", "pools sized by throughput", options, sla_counts(options.slo))


@SYSTEMS.register("reactive")
def reactive(options: SystemOptions) -> System:
    """Arrow alone, which changes labels only once the load is there."""
    return replace(arrow(options), name="reactive", summary="role flips without a forecast: Arrow")


def _forecast(name: str, summary: str, options: SystemOptions, counts: Counts) -> System:
    needs = frozenset({Signal.PROFILE, Signal.FORECAST})
    controller = PlannerController(name, by_forecast(counts), options.fleet, needs)
    return _sized(name, summary, options, controller)


def _sized(name: str, summary: str, options: SystemOptions, controller: Controller[Any]) -> System:
    return System(
        name=name,
        summary=summary,
        roles=options.roles(),
        prefill=MINIMAL_LOAD,
        decode=MINIMAL_LOAD,
        controllers=(controller,),
        window_s=options.tick_s,
    )
