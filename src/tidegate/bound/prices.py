"""Prices on work that no step can beat: the heart of the bound of ``limit``.

A price list says what a second of each kind of instance costs, and what a prefill token, a decode and a
second of a decode's life are worth. It is *fair* when no admissible step earns more than its time costs. The
linear program here looks for the fair list under which a given mix of work is worth most; ``fair`` then
makes it exactly fair, by trying every batch size, so that nothing rests on the solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

from tidegate.bound.demand import Batching, Demand, DemandKind
from tidegate.costs.forms import MixedCost, PrefillCost, Values

_POINTS = 12
"""Positions in prompts, and lengths of contexts, at which the program values a token."""
_SAMPLED = 4000
"""Requests from which the program takes those points."""
_INSIDE = np.array([1.0, 3.0, 5.0]) / 6.0
"""Where inside a prompt or an answer those points lie."""
_GRID = 48
"""Batch sizes that the program knows; ``fair`` tries them all."""


@dataclass(frozen=True, slots=True, eq=False)
class ExtremeSteps:
    """Steps that a fair price list must withstand, one entry each; every other step lies between some.

    A step of ``kind``, priced by the mixed form where ``mixed`` is 1, computes ``new`` prompt tokens with
    ``pairs`` of attention beside ``batch`` decodes. Those hold ``context`` tokens, ``private`` of which no
    other request shares. It takes ``seconds`` at least.
    """

    kind: NDArray[np.int64]
    mixed: NDArray[np.int64]
    new: Values
    pairs: Values
    batch: Values
    context: Values
    private: Values
    seconds: Values


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """Worth, in fleet seconds, of work by the form f of its step: 0 with chunks or decodes only, 1 mixed.

    A prompt token at position x is worth ``token[f] + position[f] * x``, a decode with context x of which u
    are private ``decode[f] + context[f] * x + private[f] * u``, less ``gap`` per second that its step takes.
    A second of an instance of kind g costs ``instance[g]``; those of the fleet sum to 1.
    """

    token: Values
    position: Values
    decode: Values
    context: Values
    private: Values
    gap: float
    instance: Values


@dataclass(frozen=True, slots=True)
class Reach:
    """The extremes of the requests that can attain; ``shared`` when some context stands in shared blocks."""

    shortest_context: float
    longest_context: float
    longest_prompt: float
    ttft_s: float
    shared: bool

    @classmethod
    def of(cls, demand: Demand, ttft_s: float) -> Reach:
        """Measure the requests of ``demand``, of which there is at least one."""
        prompt = demand.prompt_tokens
        longest_context = float(np.max(prompt + demand.decodes))
        shared = bool(np.any(demand.shared_tokens))
        return cls(float(np.min(prompt)) + 1.0, longest_context, float(np.max(prompt)), ttft_s, shared)


def steps_of(
    kinds: Sequence[DemandKind], batching: Batching, reach: Reach, *, every_batch: bool
) -> ExtremeSteps:
    """Return the extreme steps of a fleet, for every batch size or for a grid of them.

    For a given batch, what a step earns less what it costs is linear in attention and piecewise linear in
    new tokens and in context, with its worst at an end or at the hinge: so those points suffice.
    """
    parts = []
    for index, kind in enumerate(kinds):
        most = batching.max_num_seqs
        if not reach.shared:
            most = min(most, int(kind.kv_tokens / reach.shortest_context))
        sizes = np.arange(1.0, most + 1.0) if every_batch else _grid(most)
        parts += [
            _prefill_steps(index, kind, batching, reach),
            _decode_steps(index, kind, batching, reach, sizes),
            _mixed_steps(index, kind, batching, reach, np.concatenate([[0.0], sizes])),
        ]
    columns = [np.concatenate([part[i] for part in parts]) for i in range(8)]
    earning = (columns[2] > 0.0) | (columns[4] > 0.0)
    columns = [column[earning] for column in columns]
    return ExtremeSteps(columns[0].astype(np.int64), columns[1].astype(np.int64), *columns[2:])


def best_prices(
    work: Demand, steps: ExtremeSteps, exact: ExtremeSteps, kinds: Sequence[DemandKind], tpot_s: float
) -> Prices | None:
    """Return the fair price list under which ``work`` is worth most; None when the program has no answer.

    ``steps`` is what the program knows, ``exact`` what the answer must withstand.
    """
    columns = 11 + len(kinds)
    rows = _step_rows(steps, columns)
    scale = np.ones(columns)
    scale[:10] = 1.0 / np.maximum(np.abs(rows[:, :10]).max(axis=0), 1e-300)
    scale[10] = 1.0 / max(1.0, float(steps.batch.max()))
    prompt_weight, prompts = _prompt_points(work)
    decode_weight, decodes = _decode_points(work)
    points = len(prompt_weight) + len(decode_weight)
    worth = np.zeros((2 * points, columns))
    worth[: 2 * len(prompt_weight), :4] = _worth_rows(prompts, prompt_weight)
    worth[2 * len(prompt_weight) :, 4:10] = _worth_rows(decodes, decode_weight)
    matrix = np.block(
        [[rows * scale, np.zeros((len(rows), points))], [worth * scale, np.repeat(np.eye(points), 2, axis=0)]]
    )
    aim = np.concatenate([np.zeros(columns), -np.ones(points)])
    aim[10] = tpot_s * decode_weight.sum() * scale[10]
    fleet = np.zeros((1, columns + points))
    fleet[0, 11:columns] = [kind.count for kind in kinds]
    total = float(fleet.sum())
    solved = linprog(
        aim, A_ub=csr_array(matrix), b_ub=np.zeros(len(matrix)), A_eq=fleet, b_eq=[total], method="highs"
    )
    if solved.x is None:
        return None
    return _fair(np.maximum(solved.x[:columns] * scale, 0.0), total, exact)


def _step_rows(steps: ExtremeSteps, columns: int) -> Values:
    """Return what every step earns per second, less what its second costs.

    Columns: token, position, decode, context, private, each pure and mixed; gap; an instance of each kind.
    """
    rows = np.zeros((len(steps.seconds), columns))
    row = np.arange(len(rows))
    for column, amount in enumerate((steps.new, steps.pairs, steps.batch, steps.context, steps.private)):
        rows[row, 2 * column + steps.mixed] = amount / np.maximum(steps.seconds, 1e-12)
    rows[:, 10] = -steps.batch
    rows[row, 11 + steps.kind] = -1.0
    return rows


def _worth_rows(features: Values, weight: Values) -> Values:
    """Return rows ``worth of a point - its weight * its price <= 0``: per point, one of each form."""
    rows = np.zeros((2 * len(weight), 2 * features.shape[1]))
    rows[0::2, 0::2] = -features * weight[:, None]
    rows[1::2, 1::2] = -features * weight[:, None]
    return rows


def _fair(found: Values, total: float, exact: ExtremeSteps) -> Prices:
    """Lower what the solver found until every step of ``exact`` earns at most its cost."""
    prices = found / total
    pure, mixed = prices[0:10:2], prices[1:10:2]
    gap, instance = float(prices[10]), prices[11:]
    amounts = np.column_stack([exact.new, exact.pairs, exact.batch, exact.context, exact.private])
    earned = np.where(exact.mixed, amounts @ mixed, amounts @ pure)
    cost = (instance[exact.kind] + gap * exact.batch) * exact.seconds
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = float(np.max(np.where(earned > 0, earned / cost, 0.0)))
    lower = 1.0 / max(1.0, excess) if np.isfinite(excess) else 0.0
    both = np.stack([pure, mixed], axis=1) * lower
    return Prices(both[0], both[1], both[2], both[3], both[4], gap, instance)


def prompt_worth(prices: Prices, demand: Demand) -> Values:
    """Return what the new prompt tokens of each request are worth, in whichever form each is worth less."""
    low = demand.cached_tokens
    return _least(prices.token, prices.position, low, low + demand.new_tokens)


def answer_worth(prices: Prices, demand: Demand, tpot_s: float) -> Values:
    """Return what the decodes of each request are worth, less what their allowed time is.

    It may be negative.
    """
    low = demand.prompt_tokens + 0.5
    base = prices.decode[:, None] - prices.private[:, None] * demand.shared_tokens
    worth = _least(base, prices.context + prices.private, low, low + demand.decodes)
    net: Values = worth - prices.gap * tpot_s * demand.decodes
    return net


def _least(base: Values, slope: Values, low: Values, high: Values) -> Values:
    """Integrate the lesser of two lines, entry 0 and 1 of ``base`` and ``slope``, from ``low`` to ``high``.

    A sum of the lesser line over the middles of unit steps is no less, for it is concave.
    """
    first, rise = base[0], base[1] - base[0]
    tilt = float(slope[1] - slope[0])
    whole = first * (high - low) + 0.5 * float(slope[0]) * (high**2 - low**2)
    cross = -rise / tilt if tilt != 0.0 else np.full_like(low, np.inf)
    middle = np.clip(cross, low, high)
    left = rise * (middle - low) + 0.5 * tilt * (middle**2 - low**2)
    right = rise * (high - middle) + 0.5 * tilt * (high**2 - middle**2)
    return np.asarray(whole + np.minimum(left, 0.0) + np.minimum(right, 0.0))


def _grid(most: int) -> Values:
    return np.unique(np.round(np.geomspace(1.0, max(most, 1), _GRID)))


def _rows(kind: int, mixed: bool, *columns: Values | float) -> tuple[Values, ...]:
    flat = np.broadcast_arrays(float(kind), float(mixed), *columns)
    return tuple(np.asarray(column, dtype=np.float64).ravel() for column in flat)


def _prefill_steps(index: int, kind: DemandKind, batching: Batching, reach: Reach) -> tuple[Values, ...]:
    form = kind.prefill
    most = min(float(batching.max_batch_tokens), _room(form, batching, reach))
    new = np.array([min(float(form.n0), most), most])[:, None]
    pairs = new * np.array([0.0, reach.longest_prompt])
    seconds = np.asarray(form.seconds(new, pairs)) + batching.host_s
    return _rows(index, False, new, pairs, 0.0, 0.0, 0.0, seconds)


def _decode_steps(
    index: int, kind: DemandKind, batching: Batching, reach: Reach, sizes: Values
) -> tuple[Values, ...]:
    batch = sizes[:, None]
    context, private = _contexts(kind, reach, batch)
    seconds = np.asarray(kind.step.seconds(batch, context)) + batching.host_s
    return _rows(index, False, 0.0, 0.0, batch, context, private, seconds)


def _mixed_steps(
    index: int, kind: DemandKind, batching: Batching, reach: Reach, sizes: Values
) -> tuple[Values, ...]:
    """Return the extreme mixed steps.

    ``batch`` and ``new`` count what requests that attain bring. Either may be 0: then a request that does not
    attain brings the decode, or the prompt token, without which the step would not be mixed.
    """
    form = kind.mixed
    batch = sizes[sizes < batching.max_batch_tokens][:, None, None, None]
    most = np.clip(min(batching.max_batch_tokens, _room(form, batching, reach)) - batch, 0.0, None)
    hinge = np.clip(float(form.n0) - batch, 0.0, most)
    new = np.concatenate([np.zeros_like(most), hinge, most], axis=1)
    pairs = new * np.array([0.0, reach.longest_prompt])[None, None, :, None]
    context, private = _contexts(kind, reach, batch)
    tokens = np.maximum(new, 1.0) + np.maximum(batch, 1.0)
    seconds = np.asarray(form.seconds(tokens, pairs, context)) + batching.host_s
    return _rows(index, True, new, pairs, batch, context, private, seconds)


def _room(form: PrefillCost | MixedCost, batching: Batching, reach: Reach) -> float:
    """Return how many tokens a step may hold that ends within the TTFT target."""
    left_s = reach.ttft_s - float(form.a_s) - batching.host_s
    if left_s < 0.0:
        return 0.0
    token_s = float(form.b_s)
    return float(form.n0) + left_s / token_s if token_s > 0.0 else np.inf


def _contexts(kind: DemandKind, reach: Reach, batch: Values) -> tuple[Values, Values]:
    """Return the extreme contexts of a batch along the last axis, and how much of each is private at most."""
    low, high = batch * reach.shortest_context, batch * reach.longest_context
    full = np.clip(float(kind.kv_tokens), low, high)
    context = np.concatenate([low, full, high if reach.shared else full], axis=-1)
    return context, np.minimum(context, float(kind.kv_tokens))


def _sample(work: Demand) -> tuple[Demand, float]:
    """Return some of the requests, evenly, and how many each stands for."""
    every = -(-len(work) // _SAMPLED)
    keep = np.arange(len(work)) % every == 0
    return work.only(keep), 1.0 / max(1, int(keep.sum()))


def _prompt_points(work: Demand) -> tuple[Values, Values]:
    """Return weights, and rows (1, position), that stand for the new prompt tokens of an average request."""
    some, share = _sample(work)
    position = some.cached_tokens[:, None] + some.new_tokens[:, None] * _INSIDE
    return _binned(np.repeat(some.new_tokens * share / len(_INSIDE), len(_INSIDE)), position.ravel())


def _decode_points(work: Demand) -> tuple[Values, Values]:
    """Return weights, and rows (1, context, private context), that stand for an average request's decodes."""
    some, share = _sample(work)
    context = some.prompt_tokens[:, None] + 0.5 + some.decodes[:, None] * _INSIDE
    private = context - some.shared_tokens[:, None]
    weight = np.repeat(some.decodes * share / len(_INSIDE), len(_INSIDE))
    return _binned(weight, context.ravel(), private.ravel())


def _binned(weight: Values, *columns: Values) -> tuple[Values, Values]:
    """Gather points into bins of equal weight, in order of the first column, keeping every mean."""
    order = np.argsort(columns[0], kind="stable")
    weight = weight[order]
    total = float(weight.sum())
    if total <= 0.0:
        return np.zeros(0), np.zeros((0, len(columns) + 1))
    bins = np.minimum((np.cumsum(weight) / total * _POINTS).astype(np.int64), _POINTS - 1)
    sums = np.bincount(bins, weight, _POINTS).astype(np.float64)
    used = sums > 0
    means = [np.bincount(bins, weight * c[order], _POINTS)[used] / sums[used] for c in columns]
    return sums[used], np.column_stack([np.ones(int(used.sum())), *means])
