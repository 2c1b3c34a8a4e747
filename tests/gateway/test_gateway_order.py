"""The order of waiting prefills: told to the engines that keep it, kept by the gateway for what it holds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from tests.gateway.gateway_cluster import Start
from tidegate.core.decision import Hold, Path, Place, Verdict
from tidegate.core.request import Request
from tidegate.fleet.member import Capabilities
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Signal
from tidegate.systems import make_system

BODY = {"prompt": [5, 9, 200, 41], "max_tokens": 4, "temperature": 0}


async def test_a_prefill_leg_carries_its_ticket_and_a_decode_leg_when_its_answer_began(start: Start) -> None:
    cluster = await start("static+edf")
    forged = {"tidegate_ticket": {"arrival_s": -9.0, "deadline_s": -8.0, "work_s": 0.0}}
    await cluster.post("/v1/completions", BODY | {"kv_transfer_params": forged}, **{"x-slo-ttft-ms": "5000"})
    prefill, decode = (engine.bodies[0]["kv_transfer_params"] for engine in cluster.engines.values())
    ticket = prefill["tidegate_ticket"]
    assert -1.0 < ticket["arrival_s"] <= 0.0
    assert abs(ticket["deadline_s"] - ticket["arrival_s"] - 5.0) < 1e-6
    assert ticket["work_s"] > 0 and ticket["tokens"] > 0
    goes_on = decode["tidegate_ticket"]
    assert abs(goes_on["deadline_s"] - goes_on["arrival_s"] - 5.0) < 1e-6
    assert goes_on["arrival_s"] <= goes_on["first_token_s"] <= 0.0 and goes_on["tpot_s"] > 0


async def test_an_engine_that_keeps_no_order_gets_no_ticket(start: Start) -> None:
    cluster = await start("static", capabilities=Capabilities(orders=False))
    await cluster.post("/v1/completions", BODY)
    assert all(
        "tidegate_ticket" not in body.get("kv_transfer_params", {})
        for engine in cluster.engines.values()
        for body in engine.bodies
    )


@dataclass
class HeldUntilOpen:
    """Holds everything until ``open``, and notes the TTFT targets of those that ask."""

    open: bool = False
    asked: list[float] = field(default_factory=list)
    needs: frozenset[Signal] = frozenset()

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        self.asked.append(request.slo.ttft_s)
        if not self.open:
            return Verdict(Hold("closed"))
        return Verdict(Place(snapshot.ids[0], None, Path.DISAGGREGATED))


async def test_held_requests_are_asked_about_in_the_systems_order(start: Start) -> None:
    policy = HeldUntilOpen()
    cluster = await start(replace(make_system("static+edf"), prefill=policy))
    tasks: list[asyncio.Task[object]] = []
    for ttft_s in (60.0, 20.0, 30.0):
        headers = {"x-slo-ttft-ms": str(ttft_s * 1000)}
        tasks.append(asyncio.create_task(cluster.post("/v1/completions", BODY, **headers)))
        await cluster.until(lambda: len(policy.asked) == len(tasks))
    policy.asked.clear()
    policy.open = True
    cluster.gateway.dispatcher.act([])
    await asyncio.gather(*tasks)
    assert policy.asked == [20.0, 30.0, 60.0]
