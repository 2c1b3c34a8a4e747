"""From the program's proposals to a ranked plan: simulate, correct the program, look around the best.

1. The program proposes the best of every family; each is searched for its goodput. What was served over what
   was predicted corrects the program, which proposes again.
2. A proposal has to beat the best one of its family so far: one run at a rate that is ``STEP`` higher tells.
   So do the neighbours of the best ones, until none beats them (hill climbing).
3. The best of all, the best of each family and the nearest others are ranked (``answer``).

Where a rate is given, the best is the cheapest that serves it, and one run at that rate tells.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from tidegate.core.instance import Role
from tidegate.experiments.jobs import Job, Workers
from tidegate.experiments.search import FLOOR, SearchSettings, search_goodput
from tidegate.planner.bounds import Bounds
from tidegate.planner.capacity import Capacities
from tidegate.planner.deployment import Deployment, Offer, PoolOf, deployment
from tidegate.planner.moves import neighbours
from tidegate.planner.program import Asked, options_of, solutions
from tidegate.planner.question import CACHE_SHARE, MODELLED_CHUNKS, Question, cached_share
from tidegate.planner.trial import TrialLength, length_for, trial_job
from tidegate.reports.comparison import LevelGoodput
from tidegate.workloads.choice import requests_of

STEP = 0.02
"""Relative gain from which on a deployment counts as better than the best so far."""
TOLERANCE = 0.02
"""Relative width at which a goodput search ends."""
SHOWN = 0.1
"""Below the level: so far attainments are shown over rates. A run that attains less ends early."""
UNKNOWN = 1.25
"""By about so much the program is wrong before anything was measured."""
HOPELESS = 0.75
"""Of the best goodput: deployments of which the corrected program expects less are not simulated."""
PROPOSALS = {"disaggregated": 5, "colocated": 3, "mixed": 2, "adaptive": 3}
"""Solutions of the program that are tried, per form of a family."""
FORMS: dict[str, tuple[tuple[Role, ...], ...]] = {
    "disaggregated": ((Role.PREFILL, Role.DECODE),),
    "colocated": ((Role.MIXED,),),
    "adaptive": ((Role.MIXED,),),
    "mixed": ((Role.PREFILL, Role.MIXED), (Role.MIXED, Role.DECODE)),
}
ROUNDS, NEAR, AROUND = 6, 0.85, 12
"""Of looking around the best, and around those of other families that serve so much of it; the neighbours
that are tried of one, those first of which the program expects most."""


@dataclass
class Simulated:
    """What simulations said of deployments: goodputs of the first seed, and runs that missed, as (rate, the
    share of the run after which that was sure)."""

    goodput_rps: dict[Deployment, float] = field(default_factory=dict)
    missed: dict[Deployment, tuple[float, float]] = field(default_factory=dict)


class PlanSearch:
    """Answers one question; ``workers`` run the simulations."""

    def __init__(self, question: Question, workers: Workers) -> None:
        self.question = question
        self.workers = workers
        setting = question.setting
        workload = requests_of(setting.workload)
        slo = setting.settings.loosest_slo
        self.capacities = Capacities(workload, slo, question.level, setting.fleet.engine)
        self.bounds = Bounds(question.setting.workload, slo, question.level, setting.fleet.engine)
        self.known = Simulated()
        self._slo = slo
        self._workload = workload
        self._adaptive = 1.0
        """What adaptive fleets serve over what mixed replicas do by the program."""
        self._runs: dict[Deployment, dict[float, list[float]]] = {}
        self._whole: dict[tuple[Deployment, float, int], dict[str, Any]] = {}
        self.length = TrialLength(0)
        """Of every run: the same for all, so that they are held side by side."""

    def by_every_system(self, chosen: Iterable[Deployment]) -> list[Deployment]:
        """Return each deployment under every system that may decide in its family."""
        systems = self.question.systems
        return [replace(each, system=name) for each in chosen for name in systems[each.family]]

    def proposals(
        self,
        family: str,
        many: int,
        rate_rps: float | None = None,
        offers: Sequence[Offer] | None = None,
    ) -> list[Deployment]:
        """Return the program's best deployments of a family, as corrected so far, under the question's budget
        or another."""
        question, chunks = self.question, MODELLED_CHUNKS
        system = self._leading_system(family)
        every = sorted({chunk for each in chunks.values() for chunk in each})
        more = self._adaptive if family == "adaptive" else 1.0
        serves = {
            (role, kind, chunk): self.capacities.of(role, kind, chunk).times(more)
            for role in Role
            for kind in question.kinds
            for chunk in every
        }
        found: dict[Deployment, None] = {}
        for roles in FORMS[family]:
            options = options_of(roles, question.kinds, chunks, serves)
            if set(roles) - {option.role for option in options}:
                continue
            asked = Asked(system, options, offers or question.offers, roles, rate_rps)
            found |= dict.fromkeys(islice(solutions(asked), many))
        return list(found)

    def _leading_system(self, family: str) -> str:
        """Return the system of the family's best deployment so far."""
        found = self.known.goodput_rps
        best = max((e for e in found if e.family == family), key=lambda e: found[e], default=None)
        return self.question.systems[family][0] if best is None else best.system

    def predicted_rps(self, chosen: Deployment) -> float:
        """Return the program's goodput of a deployment."""
        by_role = self.capacities.by_role(chosen)
        mixed_rps = by_role.get(Role.MIXED, 0.0)
        if chosen.family == "adaptive":
            return self._adaptive * mixed_rps
        if chosen.family == "disaggregated":
            return min(by_role.get(Role.PREFILL, 0.0), by_role.get(Role.DECODE, 0.0))
        return mixed_rps + 0.5 * (by_role.get(Role.PREFILL, 0.0) + by_role.get(Role.DECODE, 0.0))

    async def do(self, job: Job) -> dict[str, Any]:
        """Return what a run of this search's worker processes gave."""
        found: dict[str, Any] = await self.workers.do(job)
        return found

    async def run_at(
        self, chosen: Deployment, rate_rps: float, seed: int = 0, level: float = 0.0
    ) -> dict[str, Any]:
        """Return what came of a deployment at a rate (``trial.attempt``); of less than ``level`` no more."""
        key = chosen, float(f"{rate_rps:.4g}"), seed
        if key not in self._whole:
            setting = chosen.applied(self.question.setting)
            title = f"{chosen.title} at {rate_rps:.3g} requests/s"
            run = await self.do(trial_job(setting, title, rate_rps, seed, self.length, level))
            if "until" in run:
                return run
            self._whole[key] = run
            self._runs.setdefault(chosen, {}).setdefault(rate_rps, []).append(run["attainment"])
        return self._whole[key]

    async def challenged(self, chosen: Deployment, rate_rps: float) -> bool:
        """Tell whether a deployment attains the level at a rate, at the cost of no more than that takes."""
        level = self.question.level
        run = await self.run_at(chosen, rate_rps, 0, level)
        if run["attainment"] < level:
            self.known.missed[chosen] = (rate_rps, run.get("until", 1.0))
        return bool(run["attainment"] >= level)

    async def attainment(self, chosen: Deployment, rate_rps: float, seed: int = 0) -> float:
        """Return what a deployment attains at a rate, or less than ``SHOWN`` below the level."""
        least = max(0.0, self.question.level - SHOWN)
        return float((await self.run_at(chosen, rate_rps, seed, least))["attainment"])

    def runs_of(self, whole: Deployment, parts: int) -> list[tuple[float, float]]:
        """Return the mean attainment of a whole deployment by rate, wherever a part of it was run."""
        runs = next((runs for one, runs in self._runs.items() if one.times(parts) == whole), {})
        return sorted((parts * rate, sum(shares) / len(shares)) for rate, shares in runs.items())

    async def measured(
        self, chosen: Deployment, guess_rps: float, seeds: Sequence[int] = (0,), growth: float = 1.06
    ) -> LevelGoodput:
        """Search a deployment's goodput around a guess of it that is wrong by about ``growth``."""

        async def attained(rate_rps: float, seed: int) -> float:
            return await self.attainment(chosen, rate_rps, seed)

        near = SearchSettings(self.question.level, guess_rps, guess_rps, TOLERANCE, growth)
        return await search_goodput(near, seeds, attained, credit=self._credit)

    def _credit(self, share: float) -> None:
        self.workers.credit(6.0 * share)

    async def first_measured(self, chosen: Deployment, guess_rps: float | None = None) -> float:
        """Return a deployment's goodput with the first seed, roughly; each is searched once."""
        if chosen not in self.known.goodput_rps:
            if guess_rps:
                found = await self.measured(chosen, guess_rps)
            else:
                found = await self.measured(chosen, max(1e-3, self.predicted_rps(chosen)), growth=UNKNOWN)
            self.known.goodput_rps[chosen] = found.goodput_rps
        return self.known.goodput_rps[chosen]

    def _first(self) -> list[Deployment]:
        """Return the program's best of each family, for any rate where it expects none to serve the asked."""
        families, rate_rps = self.question.families, self.question.rate_rps
        first = [each for family in families for each in self.proposals(family, 1, rate_rps)]
        return first or [each for family in families for each in self.proposals(family, 1)]

    def expected_length(self, starts: Sequence[Deployment] = ()) -> TrialLength:
        """Return how long a trial is at the most that the program expects of the ``starts``."""
        most_rps = max(map(self.predicted_rps, starts or self._first()), default=0.0)
        return length_for(self._workload, self._slo.tpot_s, most_rps)

    async def run(self, also: Sequence[Deployment] = ()) -> list[Deployment]:
        """Return the deployments to rank, the best first by what is known of them. ``also`` are searched as
        well."""
        starts = [*also, *self.by_every_system(self._first())]
        if not starts:
            return []
        self.length = self.expected_length(starts)
        await self._measured_first(starts)
        self._correct()
        if self.question.rate_rps is not None:
            from tidegate.planner.cheapest import cheapest

            return await cheapest(self, self.question.rate_rps)
        await self.challenge(
            each for family in self.question.families for each in self.proposals(family, PROPOSALS[family])
        )
        await self.challenge(self._of_one_size(), unhoped=True)
        tried: set[Deployment] = set()
        for _ in range(ROUNDS):
            around = self._around(tried)
            if not around:
                break
            tried |= set(around)
            await self.challenge([near for chosen in around for near in self._promising(chosen)])
        self._correct()
        return await self._finalists()

    async def _measured_first(self, starts: Sequence[Deployment]) -> None:
        """Measure deployments about which nothing is known; of those that have the same pools one system's
        goodput tells where to look for the others'."""
        by_pools: dict[tuple[PoolOf, ...], list[Deployment]] = {}
        for each in starts:
            by_pools.setdefault(each.pools, []).append(each)

        async def measured(alike: Sequence[Deployment]) -> None:
            guess_rps: float | None = None
            for each in alike:
                guess_rps = await self.first_measured(each, guess_rps)

        await asyncio.gather(*map(measured, by_pools.values()))

    @property
    def best_rps(self) -> float:
        return max(self.known.goodput_rps.values(), default=0.0)

    def _of_one_size(self) -> list[Deployment]:
        """Return the best fleet of each family whose replicas do both, with all GPUs of a kind in replicas of
        each size: what larger replicas gain by sharing one prefix cache the program does not see. None where
        prompts share little."""
        if cached_share(self._workload) < CACHE_SHARE:
            return []
        found, have = self.known.goodput_rps, {offer.gpu: offer.count for offer in self.question.offers}
        leaders = {each.family: each for each in sorted(found, key=lambda each: found[each])}
        return [
            deployment(best.system, [PoolOf(Role.MIXED, kind, have[kind.gpu] // kind.tp, chunk)])
            for family, best in leaders.items()
            if family in ("colocated", "adaptive")
            for chunk in {pool.chunk_tokens for pool in best.pools}
            for kind in self.question.kinds
            if kind.tp <= have[kind.gpu]
        ]

    def _around(self, tried: set[Deployment]) -> list[Deployment]:
        """Return where to look next: the best deployment, and those of other families that are near."""
        found = self.known.goodput_rps
        ranked = sorted((each for each in found if each not in tried), key=lambda each: -found[each])
        leaders: dict[str, Deployment] = {}
        for each in sorted(found, key=lambda each: -found[each]):
            leaders.setdefault(each.family, each)
        near = [each for each in leaders.values() if found[each] >= NEAR * self.best_rps]
        return [each for each in ranked if each in near]

    def _promising(self, chosen: Deployment) -> list[Deployment]:
        """Return the neighbours to try."""
        near = [each for each in neighbours(self.question, chosen) if self._may_be_best(each)]
        return sorted(near, key=lambda each: -self.predicted_rps(each))[:AROUND]

    async def challenge(self, chosen: Iterable[Deployment], *, unhoped: bool = False) -> None:
        """Try deployments at a rate above the best of their family; those that attain are searched.

        Those of which the program expects little are left out, unless they are ``unhoped``, too. What the
        program expects most of comes first, so that the best is raised early.
        """
        new = [each for each in dict.fromkeys(chosen) if each not in self.known.goodput_rps]
        new = [each for each in new if (self._may_serve_more if unhoped else self._may_be_best)(each)]
        new.sort(key=lambda each: -self.predicted_rps(each))

        async def tried(each: Deployment) -> None:
            # Where nothing of the family serves, the lowest rate of a search tells whether this one does.
            lowest_rps = FLOOR * max(1e-3, self.predicted_rps(each))
            rate_rps = (1.0 + STEP) * self._bar_rps(each) or lowest_rps
            before = self.known.missed.get(each)
            if before is not None and before[0] <= rate_rps:
                return
            if await self.challenged(each, rate_rps) and each not in self.known.goodput_rps:
                await self.first_measured(each, rate_rps)  # which is known to attain

        width = 4
        for start in range(0, len(new), width):
            await asyncio.gather(*map(tried, new[start : start + width]))

    def _may_be_best(self, chosen: Deployment) -> bool:
        """Tell whether a deployment is worth a simulation: no bound excludes it, and the program hopes."""
        return self.predicted_rps(chosen) >= HOPELESS * self.best_rps and self._may_serve_more(chosen)

    def _may_serve_more(self, chosen: Deployment) -> bool:
        """Tell whether no bound says that a deployment is not the best of its family."""
        return self.bounds.rps(chosen, self.length) > (1.0 + STEP) * self._bar_rps(chosen)

    def _bar_rps(self, chosen: Deployment) -> float:
        """Return what a deployment has to beat: the best of its family."""
        return max(
            (rps for e, rps in self.known.goodput_rps.items() if e.family == chosen.family), default=0.0
        )

    def _correct(self) -> None:
        """Set the factors of the program by what binds in the deployments that were searched."""
        logs: dict[Role, list[float]] = {}
        for chosen, served_rps in self.known.goodput_rps.items():
            predicted = self.capacities.by_role(chosen)
            if chosen.family in ("mixed", "adaptive") or served_rps <= 0.0 or min(predicted.values()) <= 0.0:
                continue
            role = min(predicted, key=lambda each: predicted[each])
            logs.setdefault(role, []).append(math.log(served_rps / predicted[role]))
        for role, values in logs.items():
            self.capacities.factors[role] *= math.exp(sum(values) / len(values))
        own = [
            math.log(served_rps / self.predicted_rps(chosen))
            for chosen, served_rps in self.known.goodput_rps.items()
            if chosen.family == "adaptive" and min(served_rps, self.predicted_rps(chosen)) > 0.0
        ]
        if own:
            self._adaptive *= math.exp(sum(own) / len(own))

    async def _finalists(self) -> list[Deployment]:
        """Return the deployments of the table, of those that serve something: those searched, and the ones
        that missed by least."""
        found, missed = self.known.goodput_rps, self.known.missed
        top = self.question.top
        leaders: dict[str, Deployment] = {}
        ranked = sorted(found, key=lambda each: -found[each])
        for each in ranked:
            leaders.setdefault(each.family, each)
        near = sorted((each for each in missed if each not in found), key=lambda each: -missed[each][1])
        spare = near[: max(0, top - len(found))]
        await asyncio.gather(*(self.first_measured(each, 0.98 * self.best_rps) for each in spare))
        ranked = sorted(found, key=lambda each: -found[each])
        kept = dict.fromkeys([*ranked[:top], *leaders.values()])
        return sorted((each for each in kept if found[each] > 0.0), key=lambda each: -found[each])
