"""How legs are sent to the simulated engines."""

from __future__ import annotations

from collections.abc import Mapping

from tidegate.control.live_request import Stage
from tidegate.core.errors import EngineUnreachable
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.dataplane.sequence import Pin, SimSequence
from tidegate.policies.order import Ticket
from tidegate.sim.simulated_request import UNREACHED, AwaitedRead, SimulatedRequest


class SentLegs:
    """Sends legs of ``requests``; ``front_s`` passes until one is in its engine's queue."""

    def __init__(
        self,
        cluster: Cluster,
        events: EventQueue,
        front_s: float,
        requests: Mapping[int, SimulatedRequest],
    ) -> None:
        self._cluster = cluster
        self._events = events
        self._front_s = front_s
        self._requests = requests

    def run(
        self,
        live: SimulatedRequest,
        on: int,
        hand_over: bool,
        ticket: Ticket | None,
        now: float,
        source: Pin | None = None,
    ) -> None:
        """Send off a leg: of one token if another leg is to follow, else of all that are left."""
        live.handing_over, live.reads = hand_over, None
        prompt, blocks = live.request.prompt_tokens + live.generated, live.blocks
        sequence = SimSequence(
            live.index,
            prompt,
            prompt + 1 if hand_over else live.most_tokens,
            hand_over,
            source or live.pin,
            blocks.keys,
            blocks.block_tokens,
            ticket,
            live.generated,
        )
        self._send(live, sequence, on, now)

    def pin_history(self, live: SimulatedRequest, held_on: int, reads: AwaitedRead, now: float) -> None:
        """Have the instance that holds a request's history pin it by a leg over one token, as the gateway
        has; ``reads`` follows that leg's end."""
        history, blocks = live.history, live.blocks
        assert history is not None
        live.reads = reads
        live.read_legs += 1
        most = history.tokens + 1
        pins = SimSequence(
            live.index,
            history.tokens,
            most,
            hand_over=True,
            block_ids=blocks.keys,
            hash_block_tokens=blocks.block_tokens,
        )
        self._send(live, pins, held_on, now)

    def abort(self, live: SimulatedRequest, name: str, now: float) -> EngineUnreachable:
        """Take a leg off the instance ``name``, which dies, and return the error with which it fails."""
        leg = live.leg
        assert leg is not None
        self._cluster.abort(leg, now)
        live.generated = max(live.generated, leg.tokens - live.request.prompt_tokens)
        live.leg, live.on, live.pin, live.reads = None, -1, None, None
        live.legs += 1
        live.handing_over = False
        stage = "decode" if live.stage is Stage.DECODE else "prefill"
        return EngineUnreachable(f"instance {name} died", instance=name, stage=stage)

    def arrive(self, index: int, legs: int, now: float) -> None:
        """Have a leg reach its engine, unless its request has ended or is on another one by now."""
        live = self._requests.get(index)
        if live is not None and live.legs == legs and live.leg is not None:
            self._cluster.submit(live.on, live.leg, now)

    def _send(self, live: SimulatedRequest, sequence: SimSequence, on: int, now: float) -> None:
        live.leg = sequence
        live.on = on
        live.placed_s = now
        live.leg_first_s = UNREACHED
        live.legs += 1
        if self._front_s > 0:
            self._events.push(now + self._front_s, EventKind.LEG, live.index, live.legs)
        else:
            self._cluster.instances[on].submit(sequence, now)
