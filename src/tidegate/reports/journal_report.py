"""The report of a journal: what the run delivered, where the time went, and what was decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from msgspec import structs

from tidegate.core.slo import Slo
from tidegate.core.stages import LATER_STAGES, TTFT_STAGES
from tidegate.journal.reader import Journal
from tidegate.journal.schema import FlipLine, InstanceLine, OutcomeLine
from tidegate.measure.attainment import DEFAULT_LEVEL, Attainment, Goodput, Observation, goodput, score
from tidegate.measure.percentiles import Summary, summarize


@dataclass(frozen=True, slots=True)
class InstanceWork:
    """What one instance did.

    ``busy_share`` is the share of the run in which at least one request prefilled or decoded on it,
    by the outcomes' stages; None when the journal has no stage times for it.
    """

    instance: str
    first_role: str
    prefills: int
    decodes: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    busy_share: float | None


@dataclass(frozen=True, slots=True)
class PrefillPrediction:
    """Relative error of the predicted prefill time, (predicted - observed)/observed.

    ``bias`` is the median signed error: positive when predictions are too long.
    """

    count: int
    median_abs_error: float
    p90_abs_error: float
    bias: float


@dataclass(frozen=True, slots=True)
class RunReport:
    """A journal in numbers; times in seconds."""

    system: str
    version: str
    slo: Slo | None
    duration_s: float
    outcomes: dict[str, int]
    unfinished: int
    attainment: Attainment
    goodput: Goodput
    ttft_s: Summary | None
    tpot_s: Summary | None
    e2e_s: Summary | None
    stages_of_ttft_s: dict[str, Summary]
    stages_after_first_token_s: dict[str, Summary]
    decisions: dict[str, int]
    flips: tuple[FlipLine, ...]
    flip_counts: dict[str, int]
    instance_events: tuple[InstanceLine, ...]
    replays: int
    replayed_requests: int
    migrations: int
    instances: tuple[InstanceWork, ...]
    prediction: PrefillPrediction | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as one JSON object."""
        value = asdict(self)
        value["flips"] = [structs.asdict(flip) for flip in self.flips]
        value["instance_events"] = [structs.asdict(event) for event in self.instance_events]
        value["attainment"] |= {
            "share": self.attainment.share,
            "ttft_share": self.attainment.ttft_share,
            "tpot_share": self.attainment.tpot_share,
        }
        return value


def build_report(journal: Journal, *, slo: Slo | None = None, level: float = DEFAULT_LEVEL) -> RunReport:
    """Score a journal. ``slo`` overrides the SLOs on record (each request's own, else the header's).

    Without either, Slo's defaults apply and a note says so. Every outcome counts as offered except
    those of requests that were wrong in themselves (``REFUSALS``); a client that left counts as a miss.
    """
    outcomes = sorted((o for o in journal.outcomes if not o.refused), key=lambda o: o.arrival_s)
    good = [o for o in outcomes if o.ok]
    fallback = slo or journal.slo or Slo()
    attainment = score(
        Observation(o.arrival_s, o.ok, o.ttft_s, o.tpot_s, slo or o.slo or fallback) for o in outcomes
    )
    own = {o.slo for o in outcomes if o.slo is not None}
    return RunReport(
        system=journal.system,
        version=journal.version,
        slo=slo or (next(iter(own)) if len(own) == 1 else None if own else fallback),
        duration_s=journal.last_t_s,
        outcomes=dict(Counter(o.outcome for o in journal.outcomes).most_common()),
        unfinished=journal.unfinished,
        attainment=attainment,
        goodput=goodput(attainment, [o.arrival_s for o in outcomes], level),
        ttft_s=summarize(o.ttft_s for o in good),
        tpot_s=summarize(o.tpot_s for o in good),
        e2e_s=summarize(o.e2e_s for o in good),
        stages_of_ttft_s=_stages(good, TTFT_STAGES),
        stages_after_first_token_s=_stages(good, LATER_STAGES),
        decisions=dict(journal.decisions.most_common()),
        flips=tuple(journal.flips),
        flip_counts=dict(
            Counter(
                f"{f.from_role} to {f.to_role}, {f.reason or 'no reason'}" for f in journal.flips
            ).most_common()
        ),
        instance_events=tuple(journal.instance_events),
        replays=sum(o.replays for o in outcomes),
        replayed_requests=sum(o.replays > 0 for o in outcomes),
        migrations=sum(o.migrations for o in outcomes),
        instances=_instance_use(journal),
        prediction=_prediction(good),
        notes=_notes(journal, slo, own),
    )


def _notes(journal: Journal, slo: Slo | None, own: set[Slo]) -> tuple[str, ...]:
    notes = []
    if journal.truncated:
        notes.append("the last line is cut off: the writer was stopped in the middle of it")
    if journal.unfinished:
        notes.append(
            f"requests with a decision but no outcome: {journal.unfinished} (still running, or the gateway "
            "was stopped); they are not scored"
        )
    refused = sum(o.refused for o in journal.outcomes)
    if refused:
        notes.append(f"requests refused as malformed: {refused}; they are counted by outcome, not scored")
    if slo is None and not own and journal.slo is None:
        notes.append(f"the journal names no SLO; scored against the default {Slo()}")
    return tuple(notes)


def _stages(good: Sequence[OutcomeLine], names: Sequence[str]) -> dict[str, Summary]:
    found = {stage: summarize(o.stages_s.get(stage) for o in good) for stage in names}
    return {stage: summary for stage, summary in found.items() if summary is not None}


def _prediction(good: Sequence[OutcomeLine]) -> PrefillPrediction | None:
    errors = np.array(
        [
            (o.predicted_prefill_s - o.observed_prefill_s) / o.observed_prefill_s
            for o in good
            if o.predicted_prefill_s is not None and o.observed_prefill_s
        ]
    )
    if errors.size == 0:
        return None
    median, p90 = np.percentile(np.abs(errors), (50, 90)).tolist()
    return PrefillPrediction(errors.size, median, p90, float(np.median(errors)))


def _instance_use(journal: Journal) -> tuple[InstanceWork, ...]:
    roles = dict(journal.roles)
    for event in journal.instance_events:
        roles.setdefault(event.instance, event.role)
    for outcome in journal.outcomes:
        for name in (outcome.prefill_on, outcome.decoded_on):
            if name:
                roles.setdefault(name, "")
    return tuple(_one_use(name, role, journal) for name, role in sorted(roles.items()))


def _one_use(name: str, role: str, journal: Journal) -> InstanceWork:
    prefilled = [o for o in journal.outcomes if o.prefill_on == name]
    decoded = [o for o in journal.outcomes if o.decoded_on == name and o.output_tokens > 0]
    intervals = [i for o in prefilled for i in _prefill_interval(o)]
    intervals += [i for o in decoded for i in _decode_interval(o)]
    busy_s = _union_s(intervals)
    return InstanceWork(
        instance=name,
        first_role=role,
        prefills=len(prefilled),
        decodes=len(decoded),
        prompt_tokens=sum(o.input_tokens for o in prefilled),
        cached_tokens=sum(o.cached_tokens for o in prefilled),
        generated_tokens=sum(o.output_tokens for o in decoded),
        busy_share=busy_s / journal.last_t_s if intervals and journal.last_t_s > 0 else None,
    )


def _prefill_interval(outcome: OutcomeLine) -> list[tuple[float, float]]:
    if outcome.e2e_s is None or "prefill" not in outcome.stages_s:
        return []
    start_s = outcome.end_s - outcome.e2e_s + outcome.stages_s.get("queue", 0.0)
    return [(start_s, start_s + outcome.stages_s["prefill"])]


def _decode_interval(outcome: OutcomeLine) -> list[tuple[float, float]]:
    if "decode" not in outcome.stages_s:
        return []
    length_s = outcome.stages_s["decode"] + outcome.stages_s.get("first_step", 0.0)
    return [(outcome.end_s - length_s, outcome.end_s)]


def _union_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the total time covered by possibly overlapping intervals."""
    total_s, reach_s = 0.0, float("-inf")
    for start_s, end_s in sorted(intervals):
        total_s += max(0.0, end_s - max(start_s, reach_s))
        reach_s = max(reach_s, end_s)
    return total_s
