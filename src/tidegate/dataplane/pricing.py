"""What the steps of a plan cost: the profile's forms, asked once per stretch."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.costs.forms import attention_work
from tidegate.costs.profile import Profile
from tidegate.dataplane.batcher import Batcher
from tidegate.dataplane.sequence import SimSequence
from tidegate.dataplane.stretch import Stretch


class StepPrices:
    """Prices the steps of one instance; ``host_s`` is added to each."""

    def __init__(self, profile: Profile, host_s: float) -> None:
        self._profile = profile
        self._host_s = host_s
        self._step_c_s = float(profile.step.c_s)
        self._prefill_c_s = float(profile.prefill.c_s)
        self._mixed_c_s = float(profile.mixed.c_s)
        self._mixed_d_s = float(profile.mixed.d_s)
        self._of_batch: list[float] = []
        self._changes = -1
        self._prompt: SimSequence | None = None
        self._chunk = 0
        self._computed = 0

    def price(self, batcher: Batcher, stretch: Stretch, now: float) -> None:
        """Set ``stretch`` to steps of the batcher's plan from ``now`` on, unless it goes on.

        It does where the plan has the decodes of the step before and, if anything, the next chunk of the
        same prompt, of the same size. Every form is linear in resident tokens and in attention work, so a
        further step costs more by the coefficient times what these grow by.
        """
        decode = batcher.decode
        batch = len(decode.members)
        if not batcher.chunks:
            if self._changes != decode.changes or self._prompt is not None:
                self._changes, self._prompt = decode.changes, None
                known = self._of_batch
                without_context = known[batch] if batch < len(known) else self._without_context(batch)
                stretch.start_s = now
                stretch.first_s = without_context + self._step_c_s * decode.context
                stretch.half_s = 0.5 * (self._step_c_s * batch)
                stretch.done = 0
            return
        if self._goes_on(batcher.chunks, decode.changes, stretch):
            return
        tokens, attention = 0, 0.0
        for sequence in batcher.chunks:
            tokens += sequence.chunk
            attention += attention_work(sequence.chunk, sequence.computed)
        squared = float(batcher.chunks[0].chunk) ** 2
        if batch:
            first_s = float(self._profile.mixed.seconds(tokens + batch, attention, decode.context))
            growth_s = self._mixed_c_s * squared + self._mixed_d_s * batch
        else:
            first_s = float(self._profile.prefill.seconds(tokens, attention))
            growth_s = self._prefill_c_s * squared
        stretch.begin(now, self._host_s + first_s, growth_s)

    def _goes_on(self, chunks: Sequence[SimSequence], changes: int, stretch: Stretch) -> bool:
        """Tell whether chunks continue those of the last call; keep in mind what the next may continue."""
        if len(chunks) > 1:
            self._changes = -1
        else:
            prompt = chunks[0]
            computed = self._computed + stretch.done * prompt.chunk
            if (
                self._prompt is prompt
                and self._changes == changes
                and (self._chunk, computed) == (prompt.chunk, prompt.computed)
            ):
                return True
            self._changes, self._prompt = changes, prompt
            self._chunk, self._computed = prompt.chunk, prompt.computed
        return False

    def _without_context(self, batch: int) -> float:
        """Return the host time and a decode step of ``batch`` requests, but for their resident tokens."""
        known = self._of_batch
        while len(known) <= batch:
            known.append(self._host_s + float(self._profile.step.seconds(float(len(known)), 0.0)))
        return known[batch]
