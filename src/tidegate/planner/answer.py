"""The ranked plan: what is predicted of each deployment, how sure that is, and what follows from it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import ConfigError
from tidegate.experiments.jobs import Workers
from tidegate.measure.percentiles import t_interval
from tidegate.planner.deployment import Deployment
from tidegate.planner.feasibility import check_feasible
from tidegate.planner.question import CACHE_SHARE, SMALL_CELLS, Question, cached_share
from tidegate.planner.search import NEAR, TOLERANCE, PlanSearch
from tidegate.planner.trial import TrialLength, trial_job, without_prefix_cache
from tidegate.reports.comparison import LevelGoodput

AS_GOOD = 0.03
"""Goodput that two deployments may differ by and still count as equally good."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A deployment of the whole budget. Goodput and rates are the whole deployment's, in requests/s.

    ``attainment`` with its interval over seeds is that at the plan's rate. ``sure`` is the probability, by
    Student's t over paired seeds, that it serves at least 97 % of what the best other one does, or the asked
    rate where there is one.
    """

    deployment: Deployment
    goodput: LevelGoodput
    attainment: tuple[float, float, float]
    ttft_p95_s: float | None
    tpot_p95_s: float | None
    sure: float

    @property
    def per_gpu_rps(self) -> float:
        return self.goodput.goodput_rps / sum(self.deployment.gpus.values())

    @property
    def per_dollar(self) -> float | None:
        """Requests per dollar at the goodput."""
        price = self.deployment.price_per_h
        return 3600.0 * self.goodput.goodput_rps / price if price else None

    def to_json(self) -> dict[str, Any]:
        chosen, found = self.deployment, self.goodput
        return {
            "family": chosen.family,
            "system": chosen.system,
            "pools": [
                {
                    "role": pool.role.label,
                    "gpu": pool.kind.gpu,
                    "tp": pool.kind.tp,
                    "replicas": pool.count,
                    "chunk_tokens": pool.chunk_tokens,
                    "profile": pool.kind.profile.name,
                }
                for pool in chosen.pools
            ],
            "gpus": dict(chosen.gpus),
            "price_per_h": chosen.price_per_h,
            "goodput_rps": found.goodput_rps,
            "goodput_low_rps": found.low_rps,
            "goodput_high_rps": found.high_rps,
            "goodput_per_gpu_rps": self.per_gpu_rps,
            "requests_per_dollar": self.per_dollar,
            "attainment": self.attainment[0],
            "attainment_low": self.attainment[1],
            "attainment_high": self.attainment[2],
            "ttft_p95_s": self.ttft_p95_s,
            "tpot_p95_s": self.tpot_p95_s,
            "confidence": self.sure,
        }


@dataclass(frozen=True, slots=True)
class RankedPlan:
    """The deployments, the best first.

    ``part`` is the question of one of its equal ``parts``, of which one was simulated.
    ``rate_rps`` is where their attainment was compared: the asked rate, else the goodput of the first.
    ``curve`` is (GPUs, family, goodput) as the corrected program predicts it.
    """

    question: Question
    ranked: tuple[Ranked, ...]
    rate_rps: float
    sentences: tuple[str, ...]
    curve: tuple[tuple[int, str, float], ...]
    parts: int
    part: Question
    length: TrialLength
    runs: dict[str, list[tuple[float, float]]]


async def answer(question: Question, workers: Workers) -> RankedPlan:
    """Search, rank and describe. Raises ConfigError where no deployment meets the SLO or serves the rate,
    saying what binds and what is nearest."""
    whole = PlanSearch(question, workers)
    check_feasible(whole.capacities, question.kinds)
    part, parts = _part_of(whole)
    search = PlanSearch(part, workers)
    found = await search.run()
    if not found:
        raise ConfigError(await _nothing(search, question, parts))
    ranked, rate_rps = await _ranked(search, found, parts)
    sentences = [*_verdict(ranked, question), *await _about_caching(search, ranked, parts)]
    sentences += [
        *_about_chunks(ranked[0].deployment),
        *_about_scale(question, part, parts),
    ]
    runs = {each.deployment.label: search.runs_of(each.deployment, parts) for each in ranked}
    return RankedPlan(
        question,
        tuple(ranked),
        rate_rps,
        tuple(sentences),
        tuple(_curve(search, question, parts)),
        parts,
        part,
        search.length,
        runs,
    )


def _part_of(whole: PlanSearch) -> tuple[Question, int]:
    """Return what is simulated: a smaller part where answers last long, for then it has many residents."""
    question = whole.question
    part, parts = question.part(_instances(whole))
    if parts > 1 and PlanSearch(part, whole.workers).expected_length().excerpt:
        return question.part(_instances(whole), SMALL_CELLS)
    return part, parts


def _instances(search: PlanSearch) -> int:
    """Return how many instances a plan is about: those of the program's own best deployment, or of the
    cheapest that serves the rate; as many as there is room for where it has none."""
    question = search.question
    found = [each for f in question.families for each in search.proposals(f, 1, question.rate_rps)]
    if question.rate_rps is None:
        best = max(found, key=search.predicted_rps, default=None)
    else:
        best = min(found, key=lambda each: each.price_per_h, default=None)
    return question.most_instances if best is None else best.instances


async def _ranked(search: PlanSearch, found: Sequence[Deployment], parts: int) -> tuple[list[Ranked], float]:
    question = search.question
    goodputs = await asyncio.gather(*(with_seeds(search, each) for each in found))
    order = list(range(len(found)))
    if question.rate_rps is None:
        order.sort(key=lambda at: -goodputs[at].goodput_rps)
    rate_rps = question.rate_rps or goodputs[order[0]].shown_rps
    leaders: set[str] = set()
    kept = []
    for place, at in enumerate(order):
        if place < question.top or found[at].family not in leaders:
            kept.append(at)
        leaders.add(found[at].family)
    ranked = []
    for at in kept:
        seeds = range(goodputs[at].seeds)
        runs = await asyncio.gather(*(search.run_at(found[at], rate_rps, seed) for seed in seeds))
        others = [goodputs[other] for other in order if other != at]
        mean, low, high = t_interval([run["attainment"] for run in runs])
        ranked.append(
            Ranked(
                found[at].times(parts),
                scaled(goodputs[at], parts),
                (mean, max(0.0, low), min(1.0, high)),
                _mean([run["ttft_p95_s"] for run in runs]),
                _mean([run["tpot_p95_s"] for run in runs]),
                _sure(goodputs[at], others, question.rate_rps),
            )
        )
    return ranked, parts * rate_rps


async def with_seeds(search: PlanSearch, chosen: Deployment) -> LevelGoodput:
    """Return a deployment's goodput over all seeds, of which the first is known: the others are near.

    Where the first is far below the best's, it stands alone: more seeds would not bring that one up."""
    question, first_rps = search.question, search.known.goodput_rps[chosen]
    by_seed: tuple[float, ...] = (first_rps,)
    far = question.rate_rps is None and first_rps < NEAR * search.best_rps
    if question.seeds > 1 and not far:
        found = await search.measured(chosen, first_rps or 1.0, range(1, question.seeds), growth=1.02)
        by_seed += found.by_seed
    mean, low, high = t_interval(by_seed)
    return LevelGoodput(question.level, "", mean, max(0.0, low), high, None, (), by_seed=by_seed)


def scaled(found: LevelGoodput, parts: int) -> LevelGoodput:
    """Return the goodput of so many equal fleets."""
    return replace(
        found,
        goodput_rps=parts * found.goodput_rps,
        low_rps=parts * found.low_rps,
        high_rps=parts * found.high_rps,
        by_seed=tuple(parts * each for each in found.by_seed),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sure(one: LevelGoodput, others: Sequence[LevelGoodput], rate_rps: float | None) -> float:
    """Return how likely it is that ``one`` serves at least 97 % of what the best of ``others`` does, or the
    rate where there is one."""
    if rate_rps is not None:
        return exceeds(one, np.full(one.seeds, rate_rps))
    if not others:
        return 1.0
    best = max(others, key=lambda each: each.goodput_rps)
    return exceeds(one, (1.0 - AS_GOOD) * np.array(best.by_seed))


def exceeds(one: LevelGoodput, wanted_rps: NDArray[np.float64]) -> float:
    """Return the probability, by Student's t over seeds, that ``one`` serves more than is wanted by seed."""
    from scipy.special import stdtr

    gains = np.array(one.by_seed) - wanted_rps
    spread = float(np.std(gains, ddof=1)) if len(gains) > 1 else 0.0
    spread = max(spread, TOLERANCE * one.goodput_rps, 1e-12)  # a search tells no more than its tolerance
    t = float(gains.mean()) / (spread / math.sqrt(len(gains)))
    return float(stdtr(max(1, len(gains) - 1), t))


def _verdict(ranked: Sequence[Ranked], question: Question) -> list[str]:
    """Say whether to disaggregate, and what that is worth."""
    first = ranked[0]
    leaders: dict[str, Ranked] = {}
    for each in ranked:
        leaders.setdefault(each.deployment.family, each)
    words = {
        "disaggregated": "Disaggregate",
        "colocated": "Do not disaggregate",
        "mixed": "Disaggregate in part: mixed replicas beside those of one phase",
        "adaptive": "Leave it to the system which replicas do what",
    }
    family = first.deployment.family
    rivals = [each for name, each in leaders.items() if name != family]
    if not rivals:
        return [f"{words[family]}: nothing else serves this."]
    if question.rate_rps is not None:
        rival = min(rivals, key=lambda each: each.deployment.price_per_h)
        saved = rival.deployment.price_per_h - first.deployment.price_per_h
        return [
            f"{words[family]}: {first.deployment.title} serves {question.rate_rps:g} requests/s for "
            f"${first.deployment.price_per_h:.2f}/h, ${saved:.2f}/h less than the cheapest "
            f"{rival.deployment.family} fleet."
        ]
    rival = max(rivals, key=lambda each: each.goodput.goodput_rps)
    ratio = first.goodput.goodput_rps / rival.goodput.goodput_rps if rival.goodput.goodput_rps else math.inf
    same = ratio < 1.0 + AS_GOOD
    text = f"{words[family]}: {first.deployment.title} serves {ratio:.2f} times as much as the best "
    text += f"{rival.deployment.family} fleet ({rival.deployment.title})"
    return [text + (", which is within what a simulation tells apart." if same else ".")]


async def _about_caching(search: PlanSearch, ranked: Sequence[Ranked], parts: int) -> list[str]:
    """Say whether it is prefix caching that makes a colocated fleet enough."""
    share = cached_share(search.capacities.workload)
    colocated = next((each for each in ranked if each.deployment.family == "colocated"), None)
    best_rps = ranked[0].goodput.goodput_rps
    if share < CACHE_SHARE or colocated is None or search.question.rate_rps is not None:
        return []
    if colocated.goodput.goodput_rps < (1.0 - AS_GOOD) * best_rps:
        lost = 1.0 - colocated.goodput.goodput_rps / best_rps
        return [f"Prefix caching alone does not suffice: colocated replicas with it serve {lost:.0%} less."]
    rate_rps = (1.0 - AS_GOOD) * best_rps / parts
    setting = without_prefix_cache(colocated.deployment.part(parts).applied(search.question.setting))
    run = await search.do(trial_job(setting, "without prefix cache", rate_rps, 0, search.length))
    if run["attainment"] < search.question.level:
        return [
            f"Prefix caching suffices: {share:.0%} of the prompts' tokens can be found in caches, and "
            f"colocated replicas serve as much as any; without caches they attain "
            f"{run['attainment']:.0%} there."
        ]
    return []


def _about_chunks(first: Deployment) -> list[str]:
    """Say so where what is planned takes engines that cut steps as they are told."""
    if first.family != "adaptive":
        return []
    return [
        f"{first.system} cuts every step by the slack of its decodes, as embedded engines do; vLLM servers "
        "have a fixed budget of a step, and serve less."
    ]


def _about_scale(question: Question, part: Question, parts: int) -> list[str]:
    if parts == 1:
        return []
    left = {offer.gpu: offer.count % parts for offer in question.offers if offer.count % parts}
    over = ", ".join(f"{count} x {gpu}" for gpu, count in left.items())
    used = ", ".join(f"{offer.count} x {offer.gpu}" for offer in part.offers)
    text = f"Simulated as one of {parts} equal parts of {used} each, which share no traffic"
    return [text + (f"; {over} are left over." if over else ".")]


def _curve(search: PlanSearch, question: Question, parts: int) -> list[tuple[int, str, float]]:
    """Return the program's goodput of each family over GPUs, corrected by what was simulated."""
    whole = sum(offer.count for offer in search.question.offers)
    found = []
    for eighths in (1, 2, 3, 4, 6, 8, 10, 12, 16):
        offers = tuple(replace(offer, count=offer.count * eighths // 8) for offer in search.question.offers)
        for family in search.question.families:
            best = [search.predicted_rps(each) for each in search.proposals(family, 1, offers=offers)]
            if best:
                found.append((parts * whole * eighths // 8, family, parts * max(best)))
    return found


async def _nothing(search: PlanSearch, question: Question, parts: int) -> str:
    """Say why nothing serves what was asked, and what is nearest."""
    rate_rps = question.rate_rps
    if rate_rps is None:
        return (
            f"no deployment of this budget attains {question.level:.0%} of {question.setting.settings.slo} "
            "at any rate: queues, transfers and neighbours take what a request alone would leave; loosen the "
            "SLO or lower --level"
        )
    best_rps = parts * search.best_rps
    have = sum(offer.count for offer in question.offers)
    need = math.ceil(have * rate_rps / best_rps) if best_rps else None
    more = f"; {rate_rps:g} would take about {need} GPUs" if need else ""
    return (
        f"the budget binds: {have} GPUs serve at most {best_rps:.3g} requests/s at {question.level:.0%} of "
        f"{question.setting.settings.slo}, so the nearest feasible is --rate {best_rps:.3g}{more}"
    )
