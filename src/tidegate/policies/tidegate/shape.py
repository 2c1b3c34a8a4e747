"""How much a fleet serves under given labels: a fluid model over what came lately, in closed form.

Per second an instance has one second. A prefill takes its work; decode steps take theirs, shared by the batch;
and where both are on one instance, a mixed step costs what the forms say beyond a decode step: the fixed part
that a batch of decodes does not hide, and that a resident token costs more beside a chunk.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import ProfileTable

Counts = NDArray[np.float64]

REMEMBERED = 2048
"""The newest answered requests of which means are taken (ours)."""
WORTH = 12.0
"""A chunk's work is so many times what a mixed step costs beyond a decode step, where decodes leave no room
for more: engines wait for such a chunk (``SlackBudget``). Chosen by simulation."""
HALVINGS = 24
"""Steps of a search for a rate, each of which halves what is left."""


class Demand(NamedTuple):
    """What a request takes on average: tokens to compute and their attention work, decode steps, and the
    tokens that a running decode holds (by the steps that it stays for)."""

    new_tokens: float
    attention: float
    steps: float
    context_tokens: float


class RecentLengths:
    """An observer that remembers the lengths of the newest answered requests."""

    def __init__(self) -> None:
        self._rows: deque[tuple[int, int, int]] = deque(maxlen=REMEMBERED)
        self.answered = 0

    def tokens(self, request: Request, generated: int, now: float) -> None:
        """Tokens alone say nothing of lengths."""

    def finished(self, request: Request, generated: int, now: float) -> None:
        """Remember a request that was answered in full."""
        history = 0 if request.history is None else request.history.tokens
        prompt = request.prompt_tokens
        cached = min(prompt - 1, max(history, max(request.cached.values(), default=0)))
        self._rows.append((prompt, cached, generated))
        self.answered += 1

    def demand(self, running_tokens: float) -> Demand | None:
        """Return the means; None where nothing was answered.

        ``running_tokens`` were generated of answers that run. As long as all that were answered are remembered
        they count: the first answers to end are the short ones, and tokens of all over ends is what an answer
        has on average (the estimate of an exponential mean from censored lives).
        """
        if not self._rows:
            return None
        prompt, cached, generated = np.array(self._rows, np.float64).T
        longer = 1.0 + running_tokens / max(1.0, generated.sum()) * len(generated) / self.answered
        generated = generated * longer
        new, steps = np.maximum(prompt - cached, 1.0), np.maximum(generated - 1.0, 0.0)
        held = prompt + 0.5 * generated
        context = float((steps * held).sum() / steps.sum()) if steps.any() else float(held.mean())
        attention = np.asarray(attention_work(new, cached))
        return Demand(float(new.mean()), float(attention.mean()), float(steps.mean()), context)


class Shape(NamedTuple):
    """How many instances prefill only, and how many do both."""

    prefill: int
    mixed: int

    def __str__(self) -> str:
        return f"{self.prefill} for prefill and {self.mixed} for both"


@dataclass(frozen=True, slots=True)
class FluidFleet:
    """The highest rates that equal instances serve, each of ``costs`` with ``kv_tokens``, for ``demand``.

    Steps of decodes last up to ``slo.tpot_s``. ``token_bytes`` of KV per token move between instances.
    """

    costs: ProfileTable
    kv_tokens: float
    token_bytes: float
    demand: Demand
    slo: Slo

    def rates_rps(self, prefill: Counts, mixed: Counts) -> Counts:
        """Return the highest rate of each labelling; the arguments are arrays of counts."""
        alone_rps = self._prefills_rps()
        low, high = np.zeros(len(prefill)), (prefill + mixed) * max(alone_rps, self._decodes_rps())
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            fits = self._busy(np.maximum(middle - prefill * alone_rps, 0.0), middle, mixed) <= 1.0
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return low

    def ranked(self, instances: int, unit: int = 1) -> list[tuple[float, Shape]]:
        """Return the labellings in steps of ``unit`` instances with their rates, the highest rate first."""
        shapes = [Shape(prefill, instances - prefill) for prefill in range(0, instances, unit)]
        rates = self.rates_rps(*np.array(shapes, np.float64).T)
        return [(float(rates[at]), shapes[at]) for at in np.argsort(-rates, kind="stable")]

    def _prefills_rps(self) -> float:
        """Return how many prefills an instance does that has nothing else to do, steps shared."""
        form = self.costs.prefill
        work_s = float(form.b_s) * self.demand.new_tokens + float(form.c_s) * self.demand.attention
        return 1.0 / max(work_s + self._port_s, 1e-9)

    def _decodes_rps(self) -> float:
        """Return how many answers an instance gives per second that prefills nothing."""
        form, demand = self.costs.step, self.demand
        if not demand.steps:
            return 1e9
        each_s = float(form.b_s) + float(form.c_s) * demand.context_tokens
        in_time = (self.slo.tpot_s - float(form.a_s)) / each_s
        batch = max(1.0, min(in_time, self.kv_tokens / demand.context_tokens))
        served = batch / (demand.steps * (float(form.a_s) + batch * each_s))
        port_s = self._port_s
        return float(min(served, 1.0 / port_s)) if port_s else float(served)

    @property
    def _port_s(self) -> float:
        return float(np.asarray(self.costs.transfer.seconds(self.demand.new_tokens * self.token_bytes)))

    def _busy(self, prefills: Counts, decodes: Counts, instances: Counts) -> Counts:
        """Return how much of their time mixed instances need for what the others leave, per second.

        With the longest gap g that the target and the KV allow, ``decodes * steps * g`` run at once; each of
        1/g steps costs its fixed part, and those that carry a chunk what a mixed step costs beyond that.
        """
        demand, step, mixed = self.demand, self.costs.step, self.costs.mixed
        each = np.maximum(instances, 1e-9)
        prefills, tokens = prefills / each, decodes * demand.steps / each
        gap_s = np.minimum(self.slo.tpot_s, self.kv_tokens / np.maximum(tokens * demand.context_tokens, 1e-9))
        batch = tokens * gap_s
        held = batch * demand.context_tokens
        step_s = np.asarray(step.seconds(batch, held))
        work_s = float(mixed.b_s) * demand.new_tokens + float(mixed.c_s) * demand.attention
        fixed_s = np.asarray(mixed.a_s + mixed.b_s * (batch - mixed.n0) + mixed.d_s * held)
        room_s = np.maximum(self.slo.tpot_s - fixed_s, 1e-9)
        over_s = fixed_s - step_s
        dear_s = prefills * work_s * np.minimum(np.maximum(over_s, 0.0) / room_s, 1.0 / WORTH)
        cheap_s = np.minimum(over_s, 0.0) * np.minimum(
            1.0 / gap_s, prefills * work_s / (mixed.b_s * mixed.n0)
        )
        extra_s = np.where(batch > 0, dear_s + cheap_s, 0.0)
        busy = prefills * work_s + extra_s + np.where(tokens > 0, step_s / np.maximum(gap_s, 1e-9), 0.0)
        idle = (prefills <= 0) & (tokens <= 0)
        return np.where(idle, 0.0, np.where(instances > 0, busy, np.inf))
