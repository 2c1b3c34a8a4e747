"""What one decision and one ledger event cost. Run: ``python benchmarks/decisions.py``.

Decisions are timed one by one among 8, 64 and 1,000 instances that hold 100 requests each: a snapshot,
then Arrow's placement of a prefill or of a decode. The instances are of two kinds, so that every price
is an array (a uniform fleet is cheaper). A round of rescheduling is timed among 256 instances that decode 64
requests each, the reading of the requests' rows included. The prefill of a conversation's round is placed
among 64 instances, and a serving from a line of 60 reordered: means, beside the 390 and 450 us that AMPD
reports. Exits 1 when a median exceeds its limit
(50, 100 and 500 us; 20 ms of CPU time for a round) or grows faster than the fleet.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from tidegate.core.decision import Place
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.session import History
from tidegate.core.slo import Slo
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.rows import Floats
from tidegate.policies.ampd.routing import WINDOW, WINDOW_S
from tidegate.policies.order import Ticket
from tidegate.policies.orders import make_order
from tidegate.policies.starting_roles import even_roles
from tidegate.systems import System, make_system
from tidegate_testing import REFERENCE, instance, request

LIMITS_US = {8: 50.0, 64: 100.0, 1000: 500.0}
RESIDENTS = 100
SAMPLES = 2000
NOW_S = 100.0
ROUND = (256, 64)
ROUND_LIMIT_MS = 20.0
ROUNDS = 15
CONVERSATIONS_US = {"ampd": 39.0, "ampd-cost": 100.0, "reorder": 45.0, "slack": 450.0}
"""Limits: of what AMPD publishes a tenth of what it reports, of ours no more than that."""


def loaded(instances: int, windows: dict[str, float] | None = None) -> Ledger:
    """Return a cluster whose instances hold RESIDENTS requests each: queued prefills or decodes."""
    slower = replace(
        REFERENCE, step=replace(REFERENCE.step, a_s=8e-3), prefill=replace(REFERENCE.prefill, b_s=3e-5)
    )
    ledger = Ledger(windows=windows)
    for index, role in enumerate(even_roles(instances)):
        ledger.instance_up(instance(f"i{index}"), slower if index % 3 else REFERENCE, role, 0.0)
    for index in range(instances):
        name = f"i{index}"
        for place in range(RESIDENTS):
            asked = request(f"{name}-{place}", 200 + 7 * (place % 13) + index % 5)
            ledger.prefill_dispatched(asked, name, 0.0)
            if ledger.role_of(name) == Role.DECODE:
                ledger.prefill_ended(asked.id, 1.0)
                ledger.decode_dispatched(asked.id, name, asked.prompt_tokens + place, 1.0)
    ledger.window_closed(1.0)
    return ledger


def decoding(instances: int, residents: int) -> Ledger:
    """Return a decode pool whose instances are loaded unequally, with known lengths."""
    rng = np.random.default_rng(1)
    left = rng.lognormal(7.0, 1.2, instances * residents)

    def forecast(requests: Sequence[Request], generated: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
        mean = left[np.array([request.turn for request in requests])]
        return mean, 0.5 * mean, 2.0 * mean

    ledger = Ledger(forecast=forecast)
    for index in range(instances):
        ledger.instance_up(instance(f"i{index}", kv_capacity_tokens=200_000), REFERENCE, Role.DECODE, 0.0)
    for number, prompt in enumerate(rng.lognormal(7.5, 0.8, instances * residents).astype(int).tolist()):
        name = f"i{int(instances * rng.random() ** 1.2)}"
        ledger.prefill_dispatched(Request(f"r{number}", prompt, 100_000, 0.0, turn=number), name, 0.0)
        ledger.decode_dispatched(f"r{number}", name, prompt, 0.0)
        ledger.tokens(f"r{number}", 1, 0.0)
    ledger.window_closed(1.0)
    return ledger


def rounds() -> list[str]:
    """Print what a round of rescheduling costs; return what is over its limit."""
    problems = []
    ledger = decoding(*ROUND)
    print(f"\n{'round':<16}{'moves':>10}{'median ms':>11}   CPU, {ROUND[0]} instances of {ROUND[1]} decodes")
    for name in ("ares", "ares-slo"):
        decide, snapshot = make_system(name).controllers[-1].decide, ledger.snapshot(NOW_S)
        moves = len(decide(snapshot, None).actions)
        ms = statistics.median(_cpu_ms(partial(decide, snapshot, None)) for _ in range(ROUNDS))
        print(f"{name:<16}{moves:>10}{ms:>11.1f}")
        if ms > ROUND_LIMIT_MS:
            problems.append(f"a round of {name}: {ms:.1f} ms")
    return problems


def conversations() -> list[str]:
    """Print what placing a round and serving from a reordered line cost; return what is over its limit."""
    ledger, problems = loaded(64, {WINDOW: WINDOW_S}), []
    home = next(name for name in ledger.ids if ledger.role_of(name) == Role.DECODE)
    for name in ledger.ids:  # so that nobody has slack for the request that is late
        ledger.prefill_ended(f"{name}-0", 5.0)
        ledger.tokens(f"{name}-0", 1, 5.0)
        ledger.tokens(f"{name}-0", 1, 6.0)
    asked = structs.replace(request("new", 6000, ttft_s=30.0), history=History(home, 5000))
    late = structs.replace(asked, slo=Slo(1e-9, 1e-9))
    means = {}
    for name in ("ampd", "ampd-cost"):
        place = partial(_placed, make_system(name), ledger, SAMPLES)
        means[name] = max(1e3 * _cpu_ms(partial(place, each)) / SAMPLES for each in (asked, late))
    for name in ("reorder", "slack"):
        queue, rng, now = make_order(name).queue(), np.random.default_rng(1), 0.0
        for number in range(60):
            queue.push(number, Ticket(0.0, 2.0, 0.1))
        start_s = time.process_time()
        for number, work_s in enumerate(rng.exponential(0.1, SAMPLES).tolist()):
            now += 0.1
            queue.push(60 + number, Ticket(now, now + 2.0, work_s))
            queue.pop(now)
        means[name] = 1e6 * (time.process_time() - start_s) / SAMPLES
    print(f"\n{'conversation':<16}{'mean us':>10}{'limit us':>10}   CPU, 64 instances; 60 in line")
    for name, mean in means.items():
        print(f"{name:<16}{mean:>10.1f}{CONVERSATIONS_US[name]:>10.0f}")
        if mean > CONVERSATIONS_US[name]:
            problems.append(f"{name}: {mean:.1f} us")
    return problems


def _placed(system: System, ledger: Ledger, times: int, asked: Request) -> None:
    for _ in range(times):
        system.prefill.place_prefill(asked, ledger.snapshot(NOW_S))


def _cpu_ms(call: Callable[[], object]) -> float:
    start_s = time.process_time()
    call()
    return 1e3 * (time.process_time() - start_s)


def timed(call: Callable[[], object], samples: int = SAMPLES) -> tuple[float, float]:
    """Return median and 99th percentile in microseconds."""
    for _ in range(samples // 10):
        call()
    times = []
    for _ in range(samples):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    times.sort()
    return statistics.median(times), times[int(0.99 * len(times))]


def decisions(ledger: Ledger, system: System) -> dict[str, Callable[[], object]]:
    """Return the decisions to time: on the common path, and where Arrow has to look for a flip."""
    asked = request("new", 1000, ttft_s=30.0)
    hopeless = Request("late", 1000, 100, 0.0, Slo(1e-3, 1e-3))
    prefill_on = next(i for i in ledger.ids if ledger.role_of(i) == Role.PREFILL)
    prefill, decode = system.prefill.place_prefill, system.decode.place_decode
    return {
        "snapshot": lambda: ledger.snapshot(NOW_S),
        "prefill": lambda: prefill(asked, ledger.snapshot(NOW_S)),
        "prefill, flip": lambda: prefill(hopeless, ledger.snapshot(NOW_S)),
        "decode": lambda: decode(asked, ledger.snapshot(NOW_S), prefill_on),
        "decode, flip": lambda: decode(hopeless, ledger.snapshot(NOW_S), prefill_on),
    }


def event_costs(ledger: Ledger, rounds: int = 20_000) -> dict[str, float]:
    """Return mean microseconds per ledger event."""
    requests = [request(f"e{n}", 300) for n in range(rounds)]
    decode_on = next(i for i in ledger.ids if ledger.role_of(i) == Role.DECODE)
    prefill_on = next(i for i in ledger.ids if ledger.role_of(i) == Role.PREFILL)
    one = requests[0].id
    phases: dict[str, Callable[[Request], object]] = {
        "prefill_dispatched": lambda r: ledger.prefill_dispatched(r, prefill_on, 2.0),
        "prefill_ended": lambda r: ledger.prefill_ended(r.id, 3.0),
        "decode_dispatched": lambda r: ledger.decode_dispatched(r.id, decode_on, 301, 3.0),
        "transfer_ended": lambda r: ledger.transfer_ended(r.id, 3.0),
        "tokens": lambda r: ledger.tokens(one, 1, 4.0),
        "finished": lambda r: ledger.finished(r.id, 5.0),
    }
    costs = {"(empty call)": _mean_us(lambda r: None, requests)}
    for name, event in phases.items():
        costs[name] = _mean_us(event, requests)
    return costs


def _mean_us(event: Callable[[Request], object], requests: list[Request]) -> float:
    start = time.perf_counter_ns()
    for asked in requests:
        event(asked)
    return (time.perf_counter_ns() - start) / 1e3 / len(requests)


def main() -> int:
    """Print the tables; return the exit status."""
    system = make_system("arrow-lending")
    medians: dict[tuple[str, int], float] = {}
    problems = []
    print(f"{'decision':<16}{'instances':>10}{'median us':>11}{'p99 us':>9}{'limit us':>10}")
    for instances, limit in LIMITS_US.items():
        ledger = loaded(instances)
        for name, call in decisions(ledger, system).items():
            median, p99 = timed(call)
            medians[name, instances] = median
            print(f"{name:<16}{instances:>10}{median:>11.1f}{p99:>9.1f}{limit:>10.0f}")
            if median > limit:
                problems.append(f"{name} among {instances}: {median:.1f} us")
            if instances == 1000 and median > medians[name, 64] * 1000 / 64:
                problems.append(f"{name} grows faster than the fleet")
    assert isinstance(system.prefill.place_prefill(request(), ledger.snapshot(NOW_S)).decision, Place)
    print(f"\n{'event':<20}{'mean us':>9}   among 1,000 instances, {RESIDENTS} requests on each")
    for name, cost in event_costs(ledger).items():
        print(f"{name:<20}{cost:>9.2f}")
    problems += rounds()
    problems += conversations()
    for problem in problems:
        print(f"over the limit: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
