"""The engine core: one compute thread around schedule, run, postprocess.

Other threads talk to it by ``submit``, ``abort``, the pins and the puller's ``done``; all of these
put a call in the inbox, which the compute thread empties between two steps.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from tidegate.core.clock import Clock, WallClock
from tidegate.core.errors import BadRequest, NoInstance
from tidegate.costs.named_profile import load_profile
from tidegate.engines.embedded.arrivals import Takeover, expected_tokens
from tidegate.engines.embedded.blocks import BlockPool, Pins
from tidegate.engines.embedded.departures import Departures
from tidegate.engines.embedded.kv_channel import TransferTimedOut
from tidegate.engines.embedded.kv_store import PagedKvStore
from tidegate.engines.embedded.length_predictor import HiddenReader, find_predictor
from tidegate.engines.embedded.model import Batch, ModelRunner, load_model
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.embedded.sampling import sample
from tidegate.engines.embedded.scheduler import BatchScheduler
from tidegate.engines.embedded.sequence import TokenSequence, draw_for, take_token, times_of
from tidegate.engines.embedded.stages import StageAnswer, StageQuestion
from tidegate.engines.embedded.step_time import Pace
from tidegate.engines.embedded.tokenizer import ModelTokenizer, load_tokenizer
from tidegate.engines.seam import RunningLeg
from tidegate.engines.serving.types import EngineStats, GenerateRequest, Output, OutputSink
from tidegate.protocol.chunks import MIGRATED

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_ANSWER_S = 4.0
"""How long the end of a step is waited for to ask something of the compute thread (ours)."""
_HOPELESS_STEPS = 8
"""Failed steps in a row after which the engine gives up: its process ends and is started anew (ours)."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one turn of the loop did: tokens computed and outputs to deliver."""

    tokens: int
    outputs: list[Output]


class EmbeddedEngine:
    """Serves requests of one model on one device.

    Build it, optionally give its ``scheduler`` a puller and run ``step`` by hand (as the self-profile does),
    then ``start``. ``submit``, ``abort``, ``stats``, ``pins`` and ``release`` are safe from any thread; the
    ``scheduler`` belongs to the compute thread, or to the caller while that is not running.
    """

    def __init__(self, config: EngineConfig, clock: Clock | None = None) -> None:
        self.config = config
        if config.device == "cpu":
            torch.set_num_threads(config.threads)
        self.model = model = load_model(config.model, config.dtype, config.device)
        self.tokenizer = ModelTokenizer(load_tokenizer(config.model), model.vocab_size)
        block_bytes = model.kv.bytes_per_token * config.block_tokens
        total_blocks = config.total_blocks or max(1, (config.kv_memory_mb << 20) // block_bytes)
        self.store = PagedKvStore(model.kv, total_blocks, config.block_tokens, model.device)
        capacity = total_blocks * config.block_tokens
        self.max_model_len = min(config.max_model_len or model.max_model_len, capacity)
        self._clock = clock or WallClock()
        self._pace = Pace(load_profile(config.pace).profile if config.pace else None, self._clock)
        self._runner = ModelRunner(model, self.store)
        self._runner.probe()
        self.pins = Pins(config.lease_s, self._clock, self._wake_up)
        self.scheduler = BatchScheduler(
            BlockPool(total_blocks, config.block_tokens), self.pins, self._clock, self._on_load_done, config
        )
        self.hidden_reader: HiddenReader | None = None
        """Gets the states that ``hidden`` of the runner has; the predictor, if there is one."""
        self._predictor = predictor = find_predictor(config, model, self.max_model_len)
        if predictor is not None:
            self.hidden_reader = predictor
        self.departures = Departures(self.scheduler, self._clock)
        self._live: dict[str, TokenSequence] = {}
        self._known: set[str] = set()
        self._outbox: list[Output] = []
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._unseen = 0
        self._stopping = False
        self._failed_steps = 0
        self._thread: threading.Thread | None = None
        self._sink: OutputSink = lambda outputs: None
        self._stats = self._read_stats()

    # Any thread

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request that fits ``max_model_len``; its outputs go to the sink. Raises ``BadRequest`` for
        an id in use or a stop token outside the vocabulary, and ``NoInstance`` when the engine is
        stopping."""
        params = request.sampling
        if any(not 0 <= token < self.model.vocab_size for token in params.stop_token_ids):
            raise BadRequest("a stop token id is outside the vocabulary", param="stop_token_ids")
        text = self.tokenizer.assembler(
            request.prompt_token_ids, request.generated, params.stop, params.min_tokens
        )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        sequence = TokenSequence(request, seed, text, self._clock.now())
        with self._wake:
            if self._stopping:
                raise NoInstance("the engine is stopping")
            if request.id in self._known:
                raise BadRequest(f"request id {request.id!r} is in use", param="request_id")
            self._known.add(request.id)
            self._unseen += 1
            self._inbox.append(partial(self._accept, sequence))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request; its last output has ``finish_reason`` abort. One that ended meanwhile pins nothing.
        No effect on an unknown id."""
        self._post(partial(self._abort, request_id))

    def stats(self) -> EngineStats:
        """Return the statistics after the last step, plus what was submitted since."""
        with self._wake:
            return replace(self._stats, waiting=self._stats.waiting + self._unseen)

    def release(self, request_id: str) -> bool:
        """Drop a pin; False when there was none."""
        return self.pins.release(request_id)

    def stage(self, question: StageQuestion) -> StageAnswer:
        """See ``Leaving.stage``."""
        return self._ask(
            lambda: self.departures.answer(self._live.get(question.request_id), question), question.request_id
        )

    def commit(self, request_id: str) -> bool:
        """See ``Leaving.commit``. Its last output is out when this returns: the batch is not waited for."""
        sequence = self.departures.commit(request_id)
        if sequence is not None:
            times = times_of(sequence, self._clock.now())
            self._deliver([Output(request_id, [], "", finish_reason=MIGRATED, times=times)])
        return sequence is not None

    def stay(self, request_id: str) -> None:
        """See ``Leaving.stay``."""
        self._post(partial(self.departures.stay, request_id))

    def start(self, sink: OutputSink) -> None:
        """Start the compute thread; ``sink`` gets every output, on that thread."""
        self._sink = sink
        self._thread = threading.Thread(target=self._loop, name="tidegate-compute", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort everything, deliver the last outputs and end the compute thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        self._take_inbox()
        for request_id in list(self._live):
            self._abort(request_id)
        self._deliver(self._take_outbox())

    # Compute thread

    def step(self) -> Step:
        """Run one turn: take the inbox, schedule, compute, postprocess. Delivers nothing by itself."""
        began_s = self._clock.now()
        self._take_inbox()
        for gone in self.departures.settle():
            self._forget(gone)
        batch = Batch([], [])
        try:
            batch = self.scheduler.schedule()
            # A pull may fill a block only in part; what stood there before must not outlive this step.
            if batch.fresh:
                self.store.clear_blocks(batch.fresh)
            if batch.tokens:
                self._compute(batch, began_s)
                self.scheduler.took(batch, self._clock.now() - began_s)
            self._failed_steps = 0
        except Exception as error:
            log.exception("a step of %d tokens failed", batch.tokens)
            touched = [*batch.singles, *(chunk.sequence for chunk in batch.chunks)]
            self._fail(touched or list(self._live.values()), error)
            self._failed_steps += 1
            if self._failed_steps >= _HOPELESS_STEPS:
                raise
        stats = self._read_stats()
        with self._wake:
            self._stats = stats
        return Step(batch.tokens, self._take_outbox())

    def place_computed(self, request: GenerateRequest, tokens: int) -> None:
        """Run ``request``, for which there must be blocks, as if its first ``tokens`` had KV. For
        measurements, while the loop is not running."""
        self.submit(request)
        self._take_inbox()
        self.scheduler.place_computed(self._live[request.id], tokens)

    def _loop(self) -> None:
        try:
            while not self._stopping:
                step = self.step()
                self._deliver(step.outputs)
                if not step.tokens:
                    self._sleep()
        except Exception as error:
            log.error("the compute thread ends")
            self._fail_all(error)
            raise

    def _fail_all(self, error: Exception) -> None:
        """Take nothing more and fail every request: the scheduler's state can no longer be trusted."""
        with self._wake:
            self._stopping = True
        self._take_inbox()
        why = f"the engine is broken: {type(error).__name__}: {error}"
        live, self._live = self._live, {}
        self._deliver([Output(request_id, [], "", finish_reason="error", error=why) for request_id in live])

    def _sleep(self) -> None:
        """Wait for a call from another thread, the end of a lease or stall, or a destination that is late."""
        ends_s = self.pins.next_deadline_s(), self.scheduler.stall_ends_s
        deadline_s = min(*ends_s, self.departures.next_deadline_s)
        timeout = None if math.isinf(deadline_s) else max(0.0, deadline_s - self._clock.now())
        with self._wake:
            if not (self._inbox or self._stopping):
                self._wake.wait(timeout)

    def _compute(self, batch: Batch, began_s: float) -> None:
        logits = self._runner.run(batch)
        sampling = batch.sampling()
        eos = self.model.eos_ids
        self._read_hidden(sampling)
        choices = sample(logits, [draw_for(sequence, eos) for sequence in sampling])
        self.scheduler.commit(batch)
        self._pace.keep(batch, began_s)
        counters = self.scheduler.counters
        counters.steps += 1
        counters.generation_tokens += len(sampling)
        now = self._clock.now()
        for sequence, choice in zip(sampling, choices, strict=True):
            if sequence.first_token_s is None:
                sequence.first_token_s = now
                prompt = len(sequence.request.prompt_token_ids)
                counters.count_prompt(prompt, sequence.cached_tokens, sequence.loaded_tokens)
            output = take_token(sequence, choice, eos, self.tokenizer)
            output.moved, sequence.moved = sequence.moved, None
            if output.finish_reason is not None:
                self._finish(sequence, output, now)
            self._outbox.append(output)

    def _read_hidden(self, sampling: list[TokenSequence]) -> None:
        """Show the hidden states to their reader: of each sequence before its first output token, and then
        of its newest token every so many."""
        reader = self.hidden_reader
        if reader is None:
            return
        rows = [row for row, sequence in enumerate(sampling) if sequence.output_position % reader.every == 0]
        if rows:
            reader.read([sampling[row] for row in rows], self._runner.hidden[rows])

    def _finish(self, sequence: TokenSequence, output: Output, now_s: float) -> None:
        """Free or pin the sequence's blocks and complete its last output."""
        blocks = self.scheduler.remove(sequence)
        if sequence.request.pin_kv and output.finish_reason in ("stop", "length"):
            # The last sampled token was never computed, so it has no KV.
            output.pinned = self.pins.pin(sequence.request.id, blocks, len(sequence.tokens) - 1)
        else:
            self.scheduler.pool.release(blocks)
        self._forget(sequence)
        output.times = times_of(sequence, now_s)

    def _end(self, sequence: TokenSequence, reason: str, error: str | None = None) -> None:
        """End a request early. Blocks that a transfer still writes to are freed when it is done. One that was
        given up to another instance has ended."""
        if sequence.request.id in self.departures:
            if not self.departures.end(sequence.request.id):
                return
        elif not sequence.loading:
            self.scheduler.pool.release(self.scheduler.remove(sequence))
        output = Output(sequence.request.id, [], "", finish_reason=reason, error=error)
        output.times = times_of(sequence, self._clock.now())
        self._forget(sequence)
        self._outbox.append(output)

    def _fail(self, sequences: list[TokenSequence], error: Exception) -> None:
        for sequence in sequences:
            if self._live.get(sequence.request.id) is sequence:
                self._end(sequence, "error", f"{type(error).__name__}: {error}")

    def _forget(self, sequence: TokenSequence) -> None:
        del self._live[sequence.request.id]
        with self._wake:
            self._known.discard(sequence.request.id)

    def _accept(self, sequence: TokenSequence) -> None:
        self._live[sequence.request.id] = sequence
        follows = sequence.request.follows
        if follows is None:
            self.scheduler.add(sequence)
        else:
            self._expect(sequence, follows)

    def _expect(self, sequence: TokenSequence, follows: RunningLeg) -> None:
        """Reserve what a decode that comes here needs, and have it brought."""
        scheduler, block_tokens = self.scheduler, self.store.block_tokens
        if scheduler.puller is None or not scheduler.expect(
            sequence, expected_tokens(sequence, block_tokens)
        ):
            self._forget(sequence)
            why = "there is no room for the decode"
            self._outbox.append(Output(sequence.request.id, [], "", finish_reason="error", error=why))
            return

        def more(tokens: int) -> bool:
            return self._ask(lambda: scheduler.expect_more(sequence, tokens), sequence.request.id)

        def wanted() -> bool:
            return self._live.get(sequence.request.id) is sequence

        done = partial(self._on_arrival, sequence)
        takeover = Takeover(sequence, follows, block_tokens, more, wanted, done)
        scheduler.puller.run((follows.host, follows.port), takeover)

    def _abort(self, request_id: str) -> None:
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._end(sequence, "abort")
        else:
            self.pins.release(request_id)  # it ended in the step that the abort waited for

    def _on_load_done(self, sequence: TokenSequence, error: str | None, moved_bytes: int) -> None:
        def finish() -> None:
            wanted = self._live.get(sequence.request.id) is sequence
            self.scheduler.finish_load(sequence, error, moved_bytes, wanted)

        self._post(finish)

    def _on_arrival(self, sequence: TokenSequence, error: str | None, moved_bytes: int) -> None:
        def finish() -> None:
            wanted = self._live.get(sequence.request.id) is sequence
            if wanted and error is not None:
                self._end(sequence, "error", error)
            self.scheduler.end_expecting(sequence, moved_bytes, arrived=wanted and error is None)

        self._post(finish)

    def _ask(self, question: Callable[[], Answer], about: str) -> Answer:
        """Have the compute thread answer between two steps. Raises what it raises, and TransferTimedOut when
        it does not get to it; then it never will."""
        answer: Future[Answer] = Future()

        def respond() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(question())
                except Exception as error:
                    answer.set_exception(error)

        self._post(respond)
        try:
            return answer.result(_ANSWER_S)
        except TimeoutError:
            if answer.cancel():
                raise TransferTimedOut(f"no step ended in {_ANSWER_S:g} s to ask for {about}") from None
            return answer.result()

    def _wake_up(self) -> None:
        """Have the compute thread take a step, which collects the pins that ended."""
        self._post(lambda: None)

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(call)
            self._wake.notify()

    def _take_inbox(self) -> None:
        with self._wake:
            calls, self._inbox = self._inbox, []
            self._unseen = 0
        for call in calls:
            call()

    def _take_outbox(self) -> list[Output]:
        outputs, self._outbox = self._outbox, []
        return outputs

    def _deliver(self, outputs: list[Output]) -> None:
        if not outputs:
            return
        try:
            self._sink(outputs)
        except Exception:
            log.exception("the output sink failed")

    def _predicted(self) -> dict[str, Any]:
        """Return what the predictor, if there is one, says in the statistics."""
        predictor = self._predictor
        if predictor is None:
            return {}
        return {
            "remaining_tokens": sum(sequence.remaining_now for sequence in self.scheduler.running),
            "predictions": predictor.made,
            "absurd_predictions": predictor.absurd,
        }

    def _read_stats(self) -> EngineStats:
        scheduler = self.scheduler
        pool = scheduler.pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            loading=len(scheduler.loading),
            pinned=len(self.pins),
            free_blocks=pool.free_blocks,
            total_blocks=pool.total_blocks,
            block_tokens=pool.block_tokens,
            kv_usage=1 - pool.free_blocks / pool.total_blocks,
            **asdict(scheduler.counters),
            **self._predicted(),
        )
