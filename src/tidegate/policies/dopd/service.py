"""What requests of given lengths take of an instance that prefills, decodes, or does both, from its cost
forms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import Profile

Values = NDArray[np.float64]

NEVER_S = 1e9
"""Between two tokens, where an instance is not done with the prefills that come."""


@dataclass(frozen=True)
class Traffic:
    """What comes: ``rate_rps`` requests per second, of lengths as in a weighted sample.

    Entry i of the three arrays is one (prompt, answer) of ``weights[i]``, which sum to 1; a mean alone would
    understate prefill, whose cost is convex in the length. ``gaps_scv`` is the squared coefficient of
    variation of the gaps between arrivals: 1 for Poisson.
    """

    rate_rps: float
    input_tokens: Values
    output_tokens: Values
    weights: Values
    gaps_scv: float = 1.0

    def __post_init__(self) -> None:
        sizes = {len(self.input_tokens), len(self.output_tokens), len(self.weights)}
        if len(sizes) > 1 or 0 in sizes:
            raise ConfigError(
                "a sample of lengths needs as many prompts as answers and weights, at least one"
            )
        shortest = min(self.input_tokens.min(), self.output_tokens.min())
        if not (shortest >= 1 and self.weights.min() >= 0 and abs(float(self.weights.sum()) - 1.0) < 1e-6):
            raise ConfigError("lengths are of at least one token, and their weights sum to 1")
        if not (0 <= self.rate_rps < float("inf") and 0 <= self.gaps_scv < float("inf")):
            raise ConfigError(f"a rate is a number of at least 0, got {self.rate_rps} requests/s")

    @classmethod
    def of(
        cls, rate_rps: float, input_tokens: ArrayLike, output_tokens: ArrayLike, gaps_scv: float = 1.0
    ) -> Traffic:
        """Return traffic whose lengths are those of a list of requests, all of the same weight."""
        inputs, outputs = np.asarray(input_tokens, np.float64), np.asarray(output_tokens, np.float64)
        return cls(rate_rps, inputs, outputs, np.full(len(inputs), 1.0 / max(1, len(inputs))), gaps_scv)

    def mean(self, values: Values) -> float:
        """Return the mean over requests of one value per entry."""
        return float(self.weights @ values)

    @cached_property
    def steps(self) -> float:
        """Mean tokens after the first: the decode steps of a request."""
        return self.mean(self.output_tokens - 1.0)


@dataclass(frozen=True)
class ServingModel:
    """An instance, as far as its speed and room go.

    ``prefill_correction`` and ``step_correction`` are observed over predicted times. ``reserve`` is the share
    of KV that the engine leaves free at admission; the other sizes are the engine's.
    """

    profile: Profile
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    block_tokens: int = 16
    max_batch_tokens: int = 8192
    max_num_seqs: int = 1024
    reserve: float = 0.01
    host_s: float = 0.0
    prefill_correction: float = 1.0
    step_correction: float = 1.0

    @cached_property
    def costs(self) -> Profile:
        """The profile with the corrections in it."""
        return self.profile.scaled(self.prefill_correction, self.step_correction)


@dataclass(frozen=True)
class Prefill:
    """Prefills of ``traffic``, alone on an instance or beside ``beside`` decodes that hold ``held_tokens``.

    Where prompts wait, an engine computes several in one step, which then pays its fixed cost once: so
    ``work_s``, what a prompt adds to a queue, is less than ``alone_s``. Such a step has room for
    ``chunk_tokens``, and counts up to a size that takes half of the TTFT target: who comes as it begins waits
    for all of it, and then for its own.
    """

    traffic: Traffic
    model: ServingModel
    slo: Slo
    beside: float = 0.0
    held_tokens: float = 0.0

    def _step_s(self, tokens: float | Values, attention: float | Values) -> Values:
        """Return the time of a step of ``tokens`` prompt tokens, beside the decodes if there are any."""
        costs = self.model.costs
        if not self.beside:
            return np.asarray(self.model.host_s + costs.prefill.seconds(tokens, attention))
        seconds = costs.mixed.seconds(tokens + self.beside, attention, self.held_tokens)
        return np.asarray(self.model.host_s + seconds)

    @cached_property
    def chunk_tokens(self) -> float:
        """Prompt tokens that a step has room for."""
        return max(1.0, self.model.max_batch_tokens - self.beside)

    @cached_property
    def steps(self) -> Values:
        """Steps that each prompt takes."""
        return np.asarray(np.ceil(self.traffic.input_tokens / self.chunk_tokens))

    @cached_property
    def alone_s(self) -> Values:
        """Seconds of each prompt where nobody else waits."""
        prompt, whole = self.traffic.input_tokens, self.steps - 1.0
        rest = prompt - whole * self.chunk_tokens
        whole_s = whole * self._step_s(self.chunk_tokens, 0.0)
        return np.asarray(whole_s + self._step_s(rest, attention_work(prompt, 0.0)))

    @cached_property
    def work_s(self) -> Values:
        """Seconds that each prompt adds to a queue."""
        prompt = self.traffic.input_tokens
        mean_tokens = self.traffic.mean(prompt)
        work_per_token = self.traffic.mean(np.asarray(attention_work(prompt, 0.0))) / mean_tokens
        tokens = np.linspace(min(mean_tokens, self.chunk_tokens), self.chunk_tokens, 129)
        in_time = self._step_s(tokens, tokens * work_per_token) <= 0.5 * self.slo.ttft_s
        step_tokens = float(tokens[max(0, int(np.count_nonzero(in_time)) - 1)])
        shared_s = prompt / step_tokens * self._step_s(step_tokens, 0.0)
        attention_s = self._step_s(0.0, attention_work(prompt, 0.0)) - self._step_s(0.0, 0.0)
        return np.minimum(self.alone_s, np.asarray(shared_s + attention_s))


@dataclass(frozen=True)
class Decode:
    """Decodes of ``traffic`` on one instance.

    ``context_tokens`` is what a running decode holds, in whole blocks: its prompt and half of its answer,
    counted by the steps that it stays for. ``kv_batch`` is how many of them fit.
    """

    traffic: Traffic
    model: ServingModel
    slo: Slo

    @cached_property
    def context_tokens(self) -> float:
        traffic, block = self.traffic, self.model.block_tokens
        held = block * np.ceil((traffic.input_tokens + 0.5 * traffic.output_tokens) / block)
        steps = traffic.output_tokens - 1.0
        return traffic.mean(steps * held) / traffic.steps if traffic.steps else traffic.mean(held)

    @cached_property
    def kv_batch(self) -> int:
        """How many decodes an instance has room for. Raises ConfigError where it is none."""
        room = self.model.kv_capacity_tokens * (1.0 - self.model.reserve)
        most = int(min(self.model.max_num_seqs, room // self.context_tokens))
        if not most:
            raise ConfigError(
                f"a request holds {self.context_tokens:.0f} tokens on average, an instance's KV {room:.0f}"
            )
        return most

    def step_s(self, batch: Values) -> Values:
        """Return the time of a step of ``batch`` decodes."""
        seconds = self.model.costs.step.seconds(batch, batch * self.context_tokens)
        return np.asarray(self.model.host_s + seconds)

    def waiting_gap_s(self, present: Values, gap_s: Values) -> Values:
        """Return the seconds between tokens where ``present`` requests are there, and ``gap_s`` with a batch.

        Beyond ``kv_batch`` the others wait for room. All of them come to run, so each gets its share.
        """
        return np.asarray(gap_s * np.maximum(1.0, present / self.kv_batch))

    @cached_property
    def longest_gap_s(self) -> Values:
        """``longest_gap_after_s`` of the mean wait, half a step."""
        return self.longest_gap_after_s(0.5)

    @cached_property
    def joining(self) -> float:
        """By which part a newcomer's first step is longer, in the largest batch: beside the others it
        computes the last token of its prompt, and such a step costs what a mixed one does."""
        batch = float(self.batch)
        mixed_s = self.model.costs.mixed.seconds(batch + 1.0, 0.0, batch * self.context_tokens)
        longer = (self.model.host_s + mixed_s) / self.step_s(np.array(batch)) - 1.0
        return max(0.0, float(longer))

    def longest_gap_after_s(self, waited: float) -> Values:
        """Return the mean gap between tokens with which each request's TPOT holds; infinite for answers of
        one token.

        TPOT counts from the first token, so moving the KV and the part ``waited`` of a step until the batch
        takes it are of it.
        """
        traffic, model = self.traffic, self.model
        steps = traffic.output_tokens - 1.0
        moved_s = model.costs.transfer.seconds(traffic.input_tokens * model.kv_bytes_per_token)
        left_s = np.maximum(0.0, self.slo.tpot_s * steps - moved_s)
        return np.where(steps > 0, left_s / np.maximum(1.0, steps + waited), np.inf)

    @cached_property
    def batch(self) -> int:
        """The largest batch that fits the KV and keeps the TPOT of the mean request.

        Where not even one decode alone does, nothing is gained by small batches, and it is all that fit.
        """
        weights = self.traffic.weights * (self.traffic.output_tokens - 1.0)
        if not weights.any():
            return self.kv_batch
        counted = weights > 0
        limit_s = float(weights[counted] @ self.longest_gap_s[counted] / weights.sum())
        batches = np.arange(1.0, self.kv_batch + 1.0)
        return int(np.searchsorted(self.step_s(batches), limit_s, side="right")) or self.kv_batch


@dataclass(frozen=True)
class Mixed:
    """Instances that prefill beside the answers of ``decode``."""

    decode: Decode

    @cached_property
    def batches(self) -> Values:
        """The numbers of decodes that fit an instance."""
        return np.arange(1.0, self.decode.kv_batch + 1.0)

    @cached_property
    def _context(self) -> Values:
        return self.batches * self.decode.context_tokens

    @cached_property
    def _steps(self) -> Values:
        return np.asarray(np.ceil(self.decode.traffic.input_tokens / self.decode.model.max_batch_tokens))

    @cached_property
    def _added_s(self) -> Values:
        """Return by how much a request's mixed steps are longer than decode steps, for each batch."""
        traffic, model, step_s = self.decode.traffic, self.decode.model, self.decode.step_s(self.batches)
        added_s = np.zeros_like(step_s)
        for prompt, steps, weight in zip(traffic.input_tokens, self._steps, traffic.weights, strict=True):
            work = attention_work(float(prompt), 0.0) / steps
            mixed_s = model.costs.mixed.seconds(prompt / steps + self.batches, work, self._context)
            added_s += weight * steps * (model.host_s + mixed_s - step_s)
        return added_s

    def gaps_s(self, each_rps: float) -> Values:
        """Return the mean gap between tokens for each batch, where an instance also prefills ``each_rps``.

        Of a prompt's steps k, each takes the place of a decode step, ``_added_s / k`` longer. In a gap g come
        ``each_rps * g`` prompts, so that g = step + each_rps * g * _added_s. With more than one such step per
        gap every step is mixed, and g = fixed + each_rps * g * slope with what a prompt adds to a step.
        """
        traffic, model, mixed = self.decode.traffic, self.decode.model, self.decode.model.costs.mixed
        tokens = traffic.mean(traffic.input_tokens)
        work = traffic.mean(np.asarray(attention_work(traffic.input_tokens, 0.0)))
        hidden_s = model.host_s + mixed.seconds(mixed.n0, 0.0, self._context)
        fixed_s = hidden_s + mixed.b_s * (self.batches - mixed.n0)
        dense_s = np.maximum(
            _repeated(hidden_s, each_rps * mixed.c_s * work),
            _repeated(fixed_s, each_rps * (mixed.b_s * tokens + mixed.c_s * work)),
        )
        sparse_s = _repeated(self.decode.step_s(self.batches), each_rps * self._added_s)
        gap_s = np.where(each_rps * traffic.mean(self._steps) * sparse_s <= 1.0, sparse_s, dense_s)
        full = each_rps * tokens * gap_s + self.batches > model.max_batch_tokens
        return np.where(full, NEVER_S, np.minimum(gap_s, NEVER_S))


def _repeated(seconds: float | Values, share: float | Values) -> Values:
    """Return g of g = seconds + share * g; NEVER_S where the share is 1 or more."""
    return np.asarray(np.where(np.less(share, 1.0), seconds / np.maximum(1e-9, 1.0 - share), NEVER_S))
