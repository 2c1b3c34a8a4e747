"""Systems that move running decodes: ARES, and Arrow with its rescheduling beside it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tidegate.policies.ares.avoiding import AvoidingConstants, AvoidingPlacement, AvoidingRescheduler
from tidegate.policies.ares.consolidation import Consolidation
from tidegate.policies.ares.damage import Damage
from tidegate.policies.ares.loads import DecodeLoads, LoadBoard
from tidegate.policies.ares.published import PERIOD_S, AresConstants, AresPlacement, AresRescheduler
from tidegate.policies.arrow.lending import LendingLimits
from tidegate.policies.baselines import MINIMAL_LOAD
from tidegate.systems.builtin import arrow_lending
from tidegate.systems.registry import SYSTEMS, SystemOptions
from tidegate.systems.system import System


@SYSTEMS.register("ares")
def ares(options: SystemOptions) -> System:
    """ARES (arXiv 2510.13668) as published: a static split whose decodes are placed and moved by the variance
    of their predicted loads."""
    constants = AresConstants()
    board = LoadBoard(partial(DecodeLoads, horizon=constants.horizon), PERIOD_S)
    placement = AresPlacement(board, constants)
    return System(
        name="ares",
        summary="static split, running decodes move to where they vary least",
        roles=options.roles(),
        prefill=MINIMAL_LOAD,
        decode=placement,
        controllers=(AresRescheduler(board, constants),),
        window_s=options.tick_s,
    )


@SYSTEMS.register("ares-slo")
def ares_slo(options: SystemOptions) -> System:
    """ARES whose moves and placements avoid seconds of SLO damage (ours)."""
    rescheduler = _avoiding_rescheduler(AvoidingConstants())
    placement = AvoidingPlacement(rescheduler.board)
    return System(
        name="ares-slo",
        summary="static split, running decodes move where that avoids SLO damage",
        roles=options.roles(),
        prefill=MINIMAL_LOAD,
        decode=placement,
        controllers=(rescheduler,),
        window_s=options.tick_s,
    )


@SYSTEMS.register("ares-slo+consolidate")
def ares_slo_consolidate(options: SystemOptions) -> System:
    """``ares-slo`` that drains decode instances while the load is low, and takes them back (ours)."""
    moving = ares_slo(options)
    return replace(
        moving,
        name="ares-slo+consolidate",
        summary="ares-slo, and decode instances that a low load does not need are emptied",
        controllers=(Consolidation(), *moving.controllers),
    )


@SYSTEMS.register("arrow+ares")
def arrow_ares(options: SystemOptions) -> System:
    """Arrow whose decodes move where that avoids SLO damage, off instances that a flip took away as well
    (ours)."""
    arrow = arrow_lending(options)
    constants = AvoidingConstants(kv_reserve=LendingLimits().kv_reserve)
    return replace(
        arrow,
        name="arrow+ares",
        summary="role flips, and running decodes move where that avoids SLO damage",
        controllers=(*arrow.controllers, _avoiding_rescheduler(constants)),
    )


def _avoiding_rescheduler(constants: AvoidingConstants) -> AvoidingRescheduler:
    board = LoadBoard(partial(Damage, terms=constants.terms), PERIOD_S)
    return AvoidingRescheduler(board, constants)
