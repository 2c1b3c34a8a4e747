"""Steps of one composition: what they cost, and their ends in closed form.

The end of a step depends on when its composition began and on which of its steps it is, and on nothing
else: not on how many events it took to get there. An instance that leaps over steps, one that stops at each,
and one that was asked about its progress on the way have the same ends, to the last bit. This is what makes
leaping exact: where two things happen at one time, such as the end of a step and that of a transfer which
began when such a step ended, they do so either way, and are put in order alike. Sums over single steps would
differ from the closed form by rounding, and rounding would decide what comes first.
"""

from __future__ import annotations

import math

from tidegate.costs.forms import attention_work
from tidegate.costs.profile import Profile
from tidegate.dataplane.decode_batch import DecodeBatch
from tidegate.dataplane.sequence import SimSequence


class Stretch:
    """Steps from ``start_s`` on, of which step i (from 0) takes ``first_s + 2 * i * half_s``.

    A batch whose composition stays grows by the same number of tokens per step, and every form of a profile
    is linear in tokens and in attention work; so the end of step k is quadratic in k. The first ``done``
    steps are over and booked, those up to ``planned`` have been announced; both count from ``start_s``.
    ``host_s`` is added to each step.
    """

    def __init__(self, profile: Profile, host_s: float) -> None:
        self.start_s = 0.0
        self.first_s = 0.0
        self.half_s = 0.0
        self.done = 0
        self.planned = 0
        self._profile = profile
        self._host_s = host_s
        self._step_c_s = float(profile.step.c_s)
        self._prefill_c_s = float(profile.prefill.c_s)
        self._mixed_c_s = float(profile.mixed.c_s)
        self._mixed_d_s = float(profile.mixed.d_s)
        self._step_s: list[float] = []
        self._changes = -1
        self._prompt: SimSequence | None = None
        self._chunk = 0
        self._computed = 0

    def end_s(self, steps: int) -> float:
        """Return when the first ``steps`` steps are over."""
        return self.start_s + steps * (self.first_s + self.half_s * (steps - 1))

    def done_by(self, now: float, known: int) -> int:
        """Return how many of the planned steps are over at ``now``; ``known`` of them are known to be."""
        planned = self.planned
        # ``end_s`` written out: this is asked for each instance before each decision.
        start_s, first_s, half_s = self.start_s, self.first_s, self.half_s
        if now < start_s + (known + 1) * (first_s + half_s * known):
            return known
        known += 1
        if planned <= known or now < start_s + (known + 1) * (first_s + half_s * known):
            return min(known, planned)
        if now >= start_s + planned * (first_s + half_s * (planned - 1)):
            return planned
        # The quadratic solved, in the form that does not cancel; off by one at most, for rounding.
        linear, spent_s = first_s - half_s, now - start_s
        root = math.sqrt(max(0.0, linear * linear + 4.0 * half_s * spent_s))
        done = int(2.0 * spent_s / (linear + root)) if linear + root > 0 else known  # a step takes time
        if done > planned:
            done = planned
        while start_s + (done + 1) * (first_s + half_s * done) <= now:
            done += 1
        while start_s + done * (first_s + half_s * (done - 1)) > now:
            done -= 1
        return done

    def price_decodes(self, decode: DecodeBatch, now: float) -> None:
        """Begin decode steps at ``now``, unless those of the same members go on."""
        if self._changes == decode.changes and self._prompt is None:
            return
        self._changes, self._prompt = decode.changes, None
        batch, known, c_s = len(decode.members), self._step_s, self._step_c_s
        while len(known) <= batch:
            known.append(self._host_s + float(self._profile.step.seconds(float(len(known)), 0.0)))
        self.start_s = now
        self.first_s = known[batch] + c_s * (decode.base_sum + (decode.ticks + 1) * batch)
        self.half_s = 0.5 * (c_s * batch)
        self.done = 0

    def price_chunks(self, chunks: list[SimSequence], decode: DecodeBatch, now: float) -> None:
        """Begin steps with ``chunks`` at ``now``, unless those go on.

        They do where they have the decodes of the step before and the next chunk, of the same size, of its
        only prompt.
        """
        prompt = chunks[0]
        size, computed = prompt.chunk, prompt.computed
        if len(chunks) == 1:
            if (
                self._prompt is prompt
                and self._changes == decode.changes
                and self._chunk == size
                and self._computed + self.done * size == computed
            ):
                return
            self._changes, self._prompt = decode.changes, prompt
            self._chunk, self._computed = size, computed
            tokens, attention = size, attention_work(size, computed)
        else:
            self._changes = -1
            tokens, attention = 0, 0.0
            for sequence in chunks:
                tokens += sequence.chunk
                attention += attention_work(sequence.chunk, sequence.computed)
        squared = float(size) ** 2
        batch = len(decode.members)
        if batch:
            context = decode.base_sum + (decode.ticks + 1) * batch
            first_s = float(self._profile.mixed.seconds(tokens + batch, attention, context))
            growth_s = self._mixed_c_s * squared + self._mixed_d_s * batch
        else:
            first_s = float(self._profile.prefill.seconds(tokens, attention))
            growth_s = self._prefill_c_s * squared
        self.start_s = now
        self.first_s = self._host_s + first_s
        self.half_s = 0.5 * growth_s
        self.done = 0
