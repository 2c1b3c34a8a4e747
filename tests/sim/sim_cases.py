"""Random clusters and workloads for the simulator's tests, and how to run them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from tidegate.core.decision import ControlDecision, Flip, Migrate
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, TransferCost
from tidegate.costs.profile import Profile
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Controller, Signal
from tidegate.sim import EngineSettings, Replica, SimRun, SimSettings, simulate
from tidegate.systems import System, make_system
from tidegate.workloads.trace import TraceRecord
from tidegate_testing import instance
from tidegate_testing.builders import REFERENCE

SYSTEMS = [
    "arrow-lending", "arrow-v1", "static", "minimal-load", "colocated", "round-robin", "ares", "ares-slo",
    "arrow+ares", "ares-slo+consolidate", "ampd", "ampd-cost", "always-remote-return", "colocated-sticky",
]  # fmt: skip
ORDERS = ["fifo", "edf", "sjf", "feasible-first", "feasible-sjf", "reorder", "slack"]


@dataclass(frozen=True)
class Ended:
    """One request of a run, with None and absent keys where its table has NaN."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    outcome: str
    first_token_s: float | None
    last_token_s: float | None
    end_s: float
    stages_s: dict[str, float]
    prefill_on: str | None
    decode_on: str | None
    preemptions: int
    cached_tokens: int
    migrations: int
    kv_transfer_bytes: int

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"


def ended(run: SimRun) -> list[Ended]:
    """Return a run's requests, one by one."""
    table = run.requests
    names = (*table.instances, None)

    def reached(at_s: float) -> float | None:
        return None if math.isnan(at_s) else float(at_s)

    return [
        Ended(
            float(table.arrival_s[i]),
            int(table.input_tokens[i]),
            int(table.output_tokens[i]),
            table.outcomes[table.outcome[i]],
            reached(table.first_token_s[i]),
            reached(table.last_token_s[i]),
            float(table.end_s[i]),
            {name: float(s[i]) for name, s in table.stages_s.items() if not math.isnan(s[i])},
            names[table.prefill_on[i]],
            names[table.decode_on[i]],
            int(table.preemptions[i]),
            int(table.cached_tokens[i]),
            int(table.migrations[i]),
            int(table.kv_transfer_bytes[i]),
        )
        for i in range(len(table))
    ]


EXPERTS = replace(
    REFERENCE,
    name="experts",
    step=StepCost(3.1e-3, 8.7e-6, 6.3e-8, 7.9e-3, 128.0, 8.0),
    mixed=MixedCost(5.3e-3, 1.9e-5, 1.3e-9, 1.7e-7, 71.0),
)
"""A model of experts, whose steps grow with the batch in a way of their own."""

BINARY = replace(
    REFERENCE,
    name="binary",
    prefill=PrefillCost(0.0, 2.0**-14, 0.0),
    step=StepCost(2.0**-8, 0.0, 2.0**-24),
    mixed=MixedCost(2.0**-8, 2.0**-14, 2.0**-30, 2.0**-24),
    transfer=TransferCost(0.0, 2.0**35),
)
"""Times that are sums of few powers of two, so that much happens at one time; links without latency."""


@dataclass(frozen=True)
class RestlessPool:
    """Flips an instance at every tick, in turn, never emptying a pool."""

    period_s: float = 0.0731
    needs: frozenset[Signal] = frozenset()
    name: str = "restless"

    def initial(self) -> int:
        return 0

    def decide(self, snapshot: Snapshot, turn: int) -> ControlDecision[int]:
        at = turn % len(snapshot)
        role = Role(int(snapshot.role[at]))
        flips: tuple[Flip, ...] = ()
        if role is not Role.MIXED and np.count_nonzero(snapshot.labelled(role)) > 1:
            to = Role.DECODE if role is Role.PREFILL else Role.PREFILL
            flips = (Flip(snapshot.ids[at], to, "forced"),)
        return ControlDecision(turn + 1, flips)


@dataclass(frozen=True)
class MovingPool:
    """Asks at every tick to move some requests, most of which are not where it says."""

    seed: int
    period_s: float = 0.0731
    needs: frozenset[Signal] = frozenset()
    name: str = "restless"

    def initial(self) -> int:
        return 0

    def decide(self, snapshot: Snapshot, turn: int) -> ControlDecision[int]:
        rng = np.random.default_rng((self.seed, turn))
        ids, requests = snapshot.ids, rng.integers(0, 40, 12).tolist()
        to = rng.integers(len(ids), size=(12, len(ids))).tolist()
        moves = tuple(
            Migrate(f"r{request}", src, ids[dst], "forced")
            for request, row in zip(requests, to, strict=True)
            for src, dst in zip(ids, row, strict=True)
        )
        return ControlDecision(turn + 1, moves)


@dataclass(frozen=True)
class Case:
    """A cluster, its system and a workload. Sizes are small enough that everything runs out at times.

    What is ``tied`` has its times on a grid of 1/16 s, and many in common.
    """

    system: str
    order: str
    tied: bool
    instances: int
    requests: int
    seed: int
    rate_rps: float
    longest_prompt: int
    longest_answer: int
    kv_tokens: int
    block_tokens: int
    max_batch_tokens: int
    max_num_seqs: int
    pool: str
    front_s: float
    host_s: float
    shared_link: bool
    lease_s: float
    heartbeat_s: float
    sessions: int
    troubled: bool
    profile: Profile = field(default=REFERENCE)

    def trace(self) -> list[TraceRecord]:
        """Arrivals and lengths of the case's seed."""
        rng = np.random.default_rng(self.seed)
        arrivals = [self._at(at_s) for at_s in np.cumsum(rng.exponential(1 / self.rate_rps, self.requests))]
        prompts = rng.integers(1, self.longest_prompt, self.requests, endpoint=True).tolist()
        answers = rng.integers(1, self.longest_answer, self.requests, endpoint=True).tolist()
        if not self.sessions:
            return [TraceRecord(a, p, o) for a, p, o in zip(arrivals, prompts, answers, strict=True)]
        turns = [0] * self.sessions
        records = []
        for arrival, prompt, answer in zip(arrivals, prompts, answers, strict=True):
            at = int(rng.integers(self.sessions))
            records.append(
                TraceRecord(
                    arrival,
                    prompt,
                    answer,
                    hash_ids=tuple(at * 100_000 + i for i in range((prompt + answer) // 37 + 1)),
                    block_tokens=37,
                    session_id=f"s{at}",
                    turn=turns[at],
                    delay_s=self._at(float(rng.exponential(0.1))),
                )
            )
            turns[at] += 1
        return records

    def fleet(self) -> list[Replica]:
        engine = EngineSettings(self.max_batch_tokens, self.max_num_seqs, self.host_s, self.lease_s)
        shape = instance(kv_capacity_tokens=self.kv_tokens, max_model_len=self.kv_tokens // 32 * 32)
        return [
            Replica(
                replace(shape, id=f"i{i}", block_tokens=self.block_tokens),
                self.profile,
                engine,
                "shared" if self.shared_link else "",
            )
            for i in range(self.instances)
        ]

    def made_system(self) -> System:
        tick_s = self._at(0.1037)
        system = make_system(f"{self.system}+{self.order}", slo=Slo(0.2, 0.02), tick_s=tick_s)
        if self.seed % 2:  # history is read wherever there is any
            system = replace(system, read_back=lambda request, snapshot, prefill_on: True)
        if not self.pool:
            return system
        pool: Controller[int] = (
            RestlessPool(tick_s) if self.pool == "restless" else MovingPool(self.seed, tick_s)
        )
        return replace(system, controllers=(pool,), window_s=tick_s)

    def settings(self, *, leap: bool) -> SimSettings:
        troubled = self.troubled and self.instances > 2
        return SimSettings(
            slo=Slo(0.2, 0.02),
            front_s=self.front_s,
            leap=leap,
            closed_loop=self.sessions > 0,
            heartbeat_s=self._at(self.heartbeat_s),
            starts_s={"i1": self._at(0.2117)} if troubled else {},
            deaths=[(self._at(0.3719), "i0"), (self._at(0.9173), "i2")] if troubled else [],
        )

    def _at(self, at_s: float) -> float:
        return round(at_s * 16) / 16 if self.tied else float(at_s)

    def run(self, *, leap: bool, missed: Callable[[int], None] | None = None) -> tuple[SimRun, bytes]:
        """Simulate; return the run and its journal."""
        journal = io.BytesIO()
        served = self.trace(), self.made_system(), self.fleet(), self.settings(leap=leap)
        done = simulate(*served, journal=journal, missed=missed)
        return done, journal.getvalue()


CASES = st.builds(
    Case,
    system=st.sampled_from(SYSTEMS),
    order=st.sampled_from(ORDERS),
    tied=st.booleans(),
    instances=st.integers(2, 5),
    requests=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    rate_rps=st.sampled_from([1.0, 20.0, 300.0]),
    longest_prompt=st.sampled_from([1, 40, 900, 2500]),
    longest_answer=st.sampled_from([1, 2, 30, 700]),
    kv_tokens=st.sampled_from([1600, 2400, 100_000]),
    block_tokens=st.sampled_from([1, 16, 32]),
    max_batch_tokens=st.sampled_from([3, 64, 8192]),
    max_num_seqs=st.sampled_from([1, 4, 1024]),
    pool=st.sampled_from(["", "restless", "moving"]),
    front_s=st.sampled_from([0.0, 0.0013]),
    host_s=st.sampled_from([0.0, 0.0007]),
    shared_link=st.booleans(),
    lease_s=st.sampled_from([0.0517, 30.0]),
    heartbeat_s=st.sampled_from([0.0, 0.0837, 1.1]),
    sessions=st.sampled_from([0, 0, 3]),
    troubled=st.booleans(),
    profile=st.sampled_from([REFERENCE, EXPERTS, BINARY]),
)
