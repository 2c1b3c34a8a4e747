"""How much a fleet serves under given labels: a fluid model over what came lately, in closed form.

A prefill takes its work, steps of decodes theirs, shared by the batch. Where both are on one instance a
chunk comes on top of a step: its fixed part hides behind the step's, and a resident token costs more beside
it. Nothing waits here, so bursts are not seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.core.slo import Slo
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import ProfileTable
from tidegate.policies.chunks import SlackBudget
from tidegate.policies.protocols import AnswerLengths
from tidegate.policies.tidegate.cost import AWAY

Counts = NDArray[np.float64]

REMEMBERED = 2048
"""The newest answered requests of which means are taken (ours)."""
WORTH = 12.0
"""A chunk's work is so many times what a mixed step costs beyond a decode step, where decodes leave no room
for more: engines wait for such a chunk (``SlackBudget``). Chosen by simulation."""
BEHIND_TARGETS = 2.0
"""How many TPOT targets a decode that moves begins behind, at most: it waits for its KV's way and for the end
of a step, which lasts as long as slack allows. Chosen by simulation (docs/policies/tidegate-figures.md)."""
BRIEF_STEPS = 6
"""Answers of more steps are taken to win back what a move put them behind, however little time each step
leaves: counting longer ones as late keeps fleets from splits that serve more (chosen by simulation)."""
PORT_SHARE = 1 / 3
"""KV keeps an instance's link busy for this share of the time at most: beyond it decodes wait for theirs
(chosen by simulation, docs/policies/tidegate-figures.md)."""
SAVED_SHARE = SlackBudget().saved_share
HALVINGS = 32
"""Steps of a search for a rate, each of which halves what is left: to 2e-10 of the highest."""


class MeanRequest(NamedTuple):
    """What a request takes on average: tokens to compute and their attention work, decode steps, and the
    tokens that a running decode holds (by the steps that it stays for). ``away_tokens`` and
    ``away_attention`` are what there is to compute where nothing of the prompt is in place; 0 where that is
    the same. ``brief`` are the shares of requests whose answers take one step, up to two, and so on, as
    far as ``BRIEF_STEPS``; empty where there are none."""

    new_tokens: float
    attention: float
    steps: float
    context_tokens: float
    away_tokens: float = 0.0
    away_attention: float = 0.0
    brief: tuple[float, ...] = ()


class RecentLengths:
    """An observer that remembers the lengths of the newest answered requests, first ``earlier`` ones, the
    oldest first, that were answered before it listened."""

    def __init__(self, earlier: Iterable[AnswerLengths] = ()) -> None:
        self._rows = np.zeros((REMEMBERED, len(AnswerLengths._fields)))
        self.count = 0
        for answer in deque(earlier, maxlen=REMEMBERED):
            self.answered(answer, 0.0)

    def answered(self, answer: AnswerLengths, now: float) -> None:
        """Remember a request that was answered in full."""
        self._rows[self.count % REMEMBERED] = answer
        self.count += 1

    def demand(self, running_tokens: float) -> MeanRequest | None:
        """Return the means; None where nothing was answered.

        ``running_tokens`` were generated of answers that run. They count as long as all that were answered
        are remembered: the first answers to end are the short ones, and all tokens over all ends is what an
        answer has on average (the estimate of an exponential mean from lives that are cut off). By as much
        as answers are longer than those that ended, fewer of them are brief.
        """
        if not self.count:
            return None
        prompt, cached, generated = self._rows[: self.count].T
        tokens_up_to = 1.0 + np.arange(1.0, BRIEF_STEPS + 1.0)
        brief = ((generated > 1.0) & (generated <= tokens_up_to[:, None])).mean(axis=1)
        longer = 1.0 + running_tokens / max(1.0, generated.sum()) * len(generated) / self.count
        generated = generated * longer
        new, steps = np.maximum(prompt - cached, 1.0), np.maximum(generated - 1.0, 0.0)
        held = prompt + 0.5 * generated
        context = float((steps * held).sum() / steps.sum()) if steps.any() else float(held.mean())
        work = float(new.mean()), float(np.asarray(attention_work(new, cached)).mean())
        away = float(prompt.mean()), float(np.asarray(attention_work(prompt, 0.0)).mean())
        return MeanRequest(*work, float(steps.mean()), context, *away, tuple((brief / longer).tolist()))


class FleetLabels(NamedTuple):
    """How many instances prefill only, and how many do both."""

    prefill: int
    mixed: int

    def __str__(self) -> str:
        return f"{self.prefill} for prefill and {self.mixed} for both"


@dataclass(frozen=True, slots=True)
class FluidFleet:
    """The highest rates that instances of ``costs``, each with ``kv_tokens``, serve for ``demand``.

    Counts are of such instances: one that takes twice as long for everything counts half. Steps of decodes
    last up to ``slo.tpot_s``. ``token_bytes`` of KV per token move between instances, and where ``reads``
    histories do, too.
    """

    costs: ProfileTable
    kv_tokens: float
    token_bytes: float
    demand: MeanRequest
    slo: Slo
    reads: bool = True

    def rates_rps(self, prefill: Counts, mixed: Counts) -> Counts:
        """Return the highest rate of each labelling; the arguments are arrays of counts.

        Brief answers whose prefill is on an instance that prefills only do not count: they are too late.
        """
        alone_rps = self._prefills_rps()
        low, high = np.zeros(len(prefill)), (prefill + mixed) / max(self._work_s, 1e-9)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            fits = self._busy(np.maximum(middle - prefill * alone_rps, 0.0), middle, mixed) <= 1.0
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return low - self._brief(low, mixed) * np.minimum(prefill * alone_rps, low)

    def _brief(self, decodes: Counts, instances: Counts) -> Counts:
        """Return the share of answers that end before what a move put them behind is won back.

        A step without a chunk is shorter than the target: the rest of it wins time.
        """
        if not self.demand.brief:
            return np.zeros(len(decodes))
        batch, _ = self._batch(decodes, instances)
        step_s = np.asarray(self.costs.step.seconds(batch, batch * self.demand.context_tokens))
        steps = BEHIND_TARGETS / np.maximum(1.0 - step_s / self.slo.tpot_s, 1e-9)
        return np.interp(steps, np.arange(len(self.demand.brief) + 1.0), (0.0, *self.demand.brief))

    def _batch(self, decodes: Counts, instances: Counts) -> tuple[Counts, Counts]:
        """Return how many run at once on each of ``instances`` where so many begin per second on all, and the
        longest gap between their tokens that the target and the KV allow."""
        tokens = decodes * self.demand.steps / np.maximum(instances, 1e-9)
        gap_s = np.minimum(
            self.slo.tpot_s, self.kv_tokens / np.maximum(tokens * self.demand.context_tokens, 1e-9)
        )
        return tokens * gap_s, gap_s

    def ranked(self, counts: Counts, unit: int = 1) -> list[tuple[float, FleetLabels]]:
        """Return the labellings in steps of ``unit`` instances with their rates, the highest rate first.

        ``counts`` is what each instance counts, those first that prefill first.
        """
        shapes = [FleetLabels(prefill, len(counts) - prefill) for prefill in range(0, len(counts), unit)]
        prefills = np.concatenate([[0.0], np.cumsum(counts)])[: len(counts) : unit]
        rates = self.rates_rps(prefills, counts.sum() - prefills)
        return [(float(rates[at]), shapes[at]) for at in np.argsort(-rates, kind="stable")]

    def _prefills_rps(self) -> float:
        """Return how many prefills an instance does that has nothing else to do, steps shared.

        What is in place of a prompt is so where its session decodes, never here: it is computed again, or
        read over where that is possible and less. Reading counts with what it costs others, as in a request's
        cost; computing costs this instance alone. Prompts share a step until its fixed part is the share
        ``SAVED_SHARE`` of the rest. The KV of one prompt leaves while the next is computed, so the longer of
        the two counts, the link for ``PORT_SHARE`` of the time.
        """
        form, demand = self.costs.mixed, self.demand
        away_s = float(form.b_s * demand.away_tokens + form.c_s * demand.away_attention)
        if self.reads:
            read_s = self._transfer_s(max(demand.away_tokens - demand.new_tokens, 0.0))
            away_s = min(away_s, self._work_s + (1.0 + AWAY) * read_s)
        away_s = max(away_s, self._work_s)
        fixed_s = max(0.0, float(form.a_s) - float(form.b_s) * float(form.n0))
        away_s += min(fixed_s, SAVED_SHARE * away_s)
        latency_s = float(np.asarray(self.costs.transfer.latency_s))
        return 1.0 / max(away_s + latency_s, self._port_s / PORT_SHARE, 1e-9)

    @property
    def _work_s(self) -> float:
        """What a prefill adds to a queue whose steps are shared."""
        form = self.costs.mixed
        return float(form.b_s * self.demand.new_tokens + form.c_s * self.demand.attention)

    @property
    def _port_s(self) -> float:
        """How long the KV of a prompt keeps the link of its instance busy, which goes on computing."""
        return self._transfer_s(max(self.demand.new_tokens, self.demand.away_tokens))

    def _transfer_s(self, tokens: float) -> float:
        """Return how long the KV of so many tokens keeps a link busy."""
        return float(np.asarray(self.costs.transfer.seconds(tokens * self.token_bytes)))

    def _busy(self, prefills: Counts, decodes: Counts, instances: Counts) -> Counts:
        """Return which part of their time ``instances`` that do both need for so many of each per second.

        With the longest gap g that the target and the KV allow, ``decodes * steps * g`` run at once, in 1/g
        steps. With a chunk, a step's weights are read once: what is over its work is dear where much context
        is held (then chunks are long and few, see ``WORTH``), and a gain where there is little.
        """
        demand, step, mixed = self.demand, self.costs.step, self.costs.mixed
        each = np.maximum(instances, 1e-9)
        work_s = prefills / each * self._work_s
        batch, gap_s = self._batch(decodes, instances)
        held = batch * demand.context_tokens
        step_s = np.asarray(step.seconds(batch, held))
        fixed_s = np.asarray(mixed.a_s + mixed.b_s * (batch - mixed.n0) + mixed.d_s * held)
        room_s = np.maximum(self.slo.tpot_s - fixed_s, 1e-9)
        over_s = fixed_s - step_s
        dear_s = work_s * np.minimum(np.maximum(over_s, 0.0) / room_s, 1.0 / WORTH)
        hidden_s = np.asarray(mixed.b_s * mixed.n0)
        chunks = np.minimum(1.0 / gap_s, work_s / np.maximum(hidden_s, 1e-9))
        extra_s = np.where(batch > 0, dear_s + np.minimum(over_s, 0.0) * chunks, 0.0)
        busy = work_s + extra_s + np.where(batch > 0, step_s / gap_s, 0.0)
        return np.where(instances > 0, busy, np.where(prefills + decodes > 0, np.inf, 0.0))
