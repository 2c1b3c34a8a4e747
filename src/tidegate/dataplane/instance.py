"""A simulated instance: steps in virtual time."""

from __future__ import annotations

import math
from typing import Protocol

from tidegate.costs.forms import attention_work
from tidegate.dataplane.batcher import Batcher, Plan
from tidegate.dataplane.events import EventQueue, Kind
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import CHUNKING, DECODING, READY, Pin, Sequence
from tidegate.dataplane.stretch import Stretch


class Listener(Protocol):
    """Whoever the instance answers to.

    Calls come in the order in which things happen, but those of ``stepped`` and ``token`` come late where the
    instance leaps: at the next ``report``, or at the stretch's end.
    """

    def stepped(self, instance: int, count: int, now: float) -> None:
        """Every decode in step got ``count`` tokens, the last one at ``now``."""
        ...

    def token(self, sequence: Sequence, now: float) -> None:
        """The sequence got a token on its own: the first of its leg, or the first after a preemption."""
        ...

    def preempted(self, sequence: Sequence) -> None:
        """The sequence lost its KV and waits to compute it again."""
        ...

    def pull(self, sequence: Sequence, instance: int, now: float) -> None:
        """The sequence was admitted and its KV is to be brought here."""
        ...

    def ended(self, sequence: Sequence, pin: Pin | None, now: float) -> None:
        """The leg has its last token."""
        ...


class SimInstance:
    """Runs a ``Batcher``'s plans: one event per step, or per stretch of steps with ``leap``."""

    def __init__(
        self, index: int, replica: Replica, events: EventQueue, listener: Listener, *, leap: bool
    ) -> None:
        self.index = index
        self.replica = replica
        self.batcher = Batcher(index, replica)
        self.version = 0
        self.report_due_s = math.inf
        self._events = events
        self._listener = listener
        self._leap = leap
        self._plan: Plan | None = None
        self._stretch: Stretch | None = None
        self._reported = 0
        self._starting = False

    # what reaches the instance

    def submit(self, sequence: Sequence, now: float) -> None:
        """Queue a leg."""
        self.batcher.queue(sequence)
        self._changed(now)

    def abort(self, sequence: Sequence, now: float) -> None:
        """Take out a sequence, with its tokens reported; the step that runs still takes its time."""
        if sequence.state == DECODING or sequence.state == CHUNKING:
            self._settle(now)
        self.batcher.discard(sequence, self._plan)
        self._changed(now)

    def loaded(self, sequence: Sequence, tokens: int, now: float) -> None:
        """Run a leg whose KV has arrived."""
        self.batcher.loaded(sequence, tokens)
        self._changed(now)

    def unpin(self, pin: Pin, now: float) -> None:
        """Free the blocks of a pin."""
        self._settle(now)
        self.batcher.blocks.give_back(pin.blocks)
        self._changed(now)

    def report(self, now: float) -> None:
        """Tell the listener of all steps that ended by ``now``."""
        if self._plan is not None and self._stretch is not None:
            self._report_until(self._plan, self._stretch, self._stretch.done_by(now))

    # steps

    def start(self, now: float) -> None:
        """Begin the next step, if there is anything to do."""
        self._starting = False
        plan = self.batcher.plan(now)
        for sequence in plan.preempted:
            self._listener.preempted(sequence)
        for sequence in plan.pulls:
            self._listener.pull(sequence, self.index, now)
        if not plan.chunks and not self.batcher.decode:
            return
        steps = self.batcher.most_steps(plan) if self._leap else 1
        self._plan, self._stretch = plan, self._stretch_of(plan, now, steps)
        self._reported = 0
        if steps > 1:
            self.report_due_s = self._stretch.end_s(1)
        self._announce(self._stretch)

    def end(self, now: float) -> None:
        """Finish the stretch: tokens, ends, and the start of what follows."""
        plan, stretch = self._plan, self._stretch
        assert plan is not None and stretch is not None
        complete = self.batcher.commit(plan, stretch.steps)
        self._report_until(plan, stretch, stretch.steps)
        self._plan = self._stretch = None
        self.report_due_s = math.inf
        self._starting = True  # once all that this end causes has been said
        for sequence in self.batcher.ended():
            if sequence.state == READY:  # not aborted meanwhile
                self._end_leg(sequence, now)
        for sequence in complete:
            if sequence.state == READY:
                self._listener.token(sequence, now)
            if sequence.state != READY:
                continue
            if sequence.tokens == sequence.last_token:
                self._end_leg(sequence, now)
            else:
                self.batcher.join(sequence)
        if self._events.none_at(now):
            self.start(now)  # its event would be the next one
        else:
            self._events.push(now, Kind.STEP_START, self.index)

    def _end_leg(self, sequence: Sequence, now: float) -> None:
        self._listener.ended(sequence, self.batcher.release(sequence, pin=sequence.hand_over), now)

    def _report_until(self, plan: Plan, stretch: Stretch, done: int) -> None:
        """Report what was not yet, the first tokens of newcomers apart."""
        if plan.newcomers and done > 0:
            first_s = stretch.end_s(1)
            self._listener.stepped(self.index, 1, first_s)
            self._reported = 1
            for sequence in plan.newcomers:
                self._listener.token(sequence, first_s)
            plan.newcomers = []
        if done > self._reported:
            self._listener.stepped(self.index, done - self._reported, stretch.end_s(done))
            self._reported = done
        self.report_due_s = stretch.end_s(done + 1)

    def _settle(self, now: float) -> None:
        """Book the steps that are over, so that what remains of the stretch is the step that runs."""
        plan, stretch = self._plan, self._stretch
        if plan is None or stretch is None or stretch.steps == 1:
            return
        done = min(stretch.done_by(now), stretch.steps - 1)
        if done > 0:
            self._report_until(plan, stretch, done)
            self.batcher.commit(plan, done)
            self.batcher.take_for_step()
            self._stretch = stretch = stretch.after(done)
            self._reported = 0
        stretch.steps = 1
        self.report_due_s = math.inf
        self._announce(stretch)

    def _changed(self, now: float) -> None:
        """Plan anew as soon as the step that runs is over."""
        stretch = self._stretch
        if stretch is not None:
            steps = stretch.done_by(now) + 1
            if steps < stretch.steps:
                stretch.steps = steps
                self._announce(stretch)
        elif not self._starting:
            self._starting = True
            self._events.push(now, Kind.STEP_START, self.index)

    def _announce(self, stretch: Stretch) -> None:
        self.version += 1
        self._events.push(stretch.end_s(stretch.steps), Kind.STEP_END, self.index, self.version)

    def _stretch_of(self, plan: Plan, now: float, steps: int) -> Stretch:
        """Price the first step, and what each further one costs more than the one before."""
        profile, decode = self.replica.profile, self.batcher.decode
        batch = len(decode)
        if not plan.chunks:
            first = float(profile.step.seconds(float(batch), float(decode.context)))
            growth = float(profile.step.c_s) * batch
        else:
            tokens = sum(chunk.count for chunk in plan.chunks)
            attention = sum(attention_work(c.count, c.sequence.computed) for c in plan.chunks)
            squared = float(plan.chunks[0].count) ** 2
            if batch:
                first = float(profile.mixed.seconds(tokens + batch, attention, decode.context))
                growth = float(profile.mixed.c_s) * squared + float(profile.mixed.d_s) * batch
            else:
                first = float(profile.prefill.seconds(tokens, attention))
                growth = float(profile.prefill.c_s) * squared
        return Stretch(now, self.replica.engine.host_s + first, growth, steps)
