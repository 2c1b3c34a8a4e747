"""One script of arrivals, deaths, returns, holds and rounds through both drivers: the same decisions."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tests.control.virtual_gateway import Asked, Change, VirtualGateway
from tidegate.control.replayed_inputs import decide_again
from tidegate.core.decision import Hold, Verdict
from tidegate.core.errors import TraceError
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import replicas_of
from tidegate.engines.emulated.vocabulary import answer
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import PrefillPlacement, Signal
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.systems.system import System
from tidegate.workloads.trace import TraceRecord
from tidegate_testing.rounds import anywhere

SLO = Slo(0.3, 0.02)
BLOCK_TOKENS = 32
INSTANCES = 4
FRONT_S = 1e-4
"""What passes before a leg is in its engine: one placed at the end of a step misses the next, in both."""


@dataclass(frozen=True)
class HoldWhenBusy:
    """Holds a prefill while more than ``most`` wait or run; else places as ``inner`` does."""

    inner: PrefillPlacement
    most: int
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        if len(snapshot) and snapshot.prefill_requests.sum() > self.most:
            return Verdict(Hold("busy"), reason="busy")
        return self.inner.place_prefill(request, snapshot)


def script(seed: int, requests: int) -> list[Asked]:
    """Bursts of prompts, a third of which begin with what their session's earlier ones began with."""
    rng = np.random.default_rng(seed)
    at_s, asked = 0.0, []
    for _ in range(requests):
        at_s += float(rng.exponential(0.002 if rng.random() < 0.8 else 0.3)) + 1e-6
        length = 2 * BLOCK_TOKENS * int(rng.integers(4, 60))
        session = int(rng.integers(0, 8)) if rng.random() < 0.3 else None
        shared = [] if session is None else [1000 + session] * (BLOCK_TOKENS * 6)
        own = rng.integers(0, 900, length).tolist()
        asked.append(
            Asked(at_s, shared + own, int(rng.integers(1, 120)), "" if session is None else f"s{session}")
        )
    return asked


def records_of(asked: list[Asked]) -> list[TraceRecord]:
    """The same requests as a trace; a block's id stands for all tokens up to its end."""
    ids: dict[tuple[int, ...], int] = {}
    records = []
    for one in asked:
        said = one.prompt + answer(one.prompt, 0, one.max_tokens)
        blocks = tuple(
            ids.setdefault(tuple(said[:end]), len(ids))
            for end in range(BLOCK_TOKENS, len(said) + 1, BLOCK_TOKENS)
        )
        records.append(
            TraceRecord(
                one.at_s,
                len(one.prompt),
                one.max_tokens,
                hash_ids=blocks,
                block_tokens=BLOCK_TOKENS,
                session_id=one.session,
            )
        )
    return records


def conversations(seed: int, sessions: int, rounds: int) -> list[Asked]:
    """Sessions whose every prompt goes on from the answer before it, or now and then contradicts it."""
    rng = np.random.default_rng(seed)
    asked = []
    for session in range(sessions):
        at_s, history = float(rng.uniform(0.0, 4.0)), list[int]()
        for _ in range(rounds):
            if history and rng.random() < 0.1:
                history = history[: len(history) // 2 // BLOCK_TOKENS * BLOCK_TOKENS]
            history = history + rng.integers(0, 900, int(rng.integers(20, 1500))).tolist()
            tokens = BLOCK_TOKENS * int(rng.integers(1, 7)) - len(history) % BLOCK_TOKENS + 1
            asked.append(Asked(at_s, history, tokens, f"s{session}" if session % 3 else ""))
            history = history + answer(history, 0, tokens)
            at_s += float(rng.exponential(1.5)) + 1e-6
    return sorted(asked, key=lambda one: one.at_s)


def decisions(lines: list[bytes]) -> list[tuple[Any, ...]]:
    """What was decided, when (to the microsecond's tenfold), and of which request; that one is still held is
    not told: how often it is asked for at one instant depends on what ends first there."""
    kept: list[tuple[Any, ...]] = []
    held: dict[str, Any] = {}
    for line in lines:
        row = orjson.loads(line)
        if row["type"] == "decision":
            before, held[row["request"]] = held.get(row["request"]), row["chosen"].get("hold")
            if before and before == held[row["request"]]:
                continue
            kept.append(
                (row["request"], row["kind"], tuple(sorted(row["chosen"].items(), key=str)), row["t"])
            )
        elif row["type"] == "flip":
            kept.append((row["instance"], "flip", row["to"], row["reason"], row["t"]))
        elif row["type"] == "control":
            kept.append(("control", row["reason"], row["t"]))
        elif row["type"] == "failure":
            kept.append((row["request"], "failure", row["reason"], row["generated"], row["t"]))
        elif row["type"] == "instance":
            kept.append((row["instance"], row["event"], row.get("role"), row["t"]))
        elif row["type"] == "session" and row["event"] != "rebuilt":  # engines say that at a leg's end
            kept.append(tuple(row.get(name) for name in ("session", "event", "instance", "tokens", "t")))
    return kept


CHANGES = [Change(1.5003, 0, False), Change(2.2507, 0, True), Change(3.1009, 2, False)]


def both(
    system: System,
    asked: list[Asked],
    changes: list[Change],
    patch: pytest.MonkeyPatch,
    *,
    admission: float = 0.0,
) -> tuple[Any, Any]:
    replicas = replicas_of(packaged_profile("h100_sxm/llama-3.1-8b"), INSTANCES)
    # What an engine finds again is to the block, which the trace can only say of its own blocks.
    replicas = [
        replace(each, instance=replace(each.instance, block_tokens=BLOCK_TOKENS)) for each in replicas
    ]
    live: list[bytes] = []
    gateway = VirtualGateway(
        system, replicas, system.order.in_engines, live, SLO, FRONT_S, patch, admission=admission
    )
    gateway.play(asked, changes)
    out = io.BytesIO()
    settings = SimSettings(
        prefix_hits=True,
        front_s=FRONT_S,
        slo=SLO,
        admission=admission,
        deaths=[(change.at_s, f"i{change.instance}") for change in changes if not change.up],
        returns=[(change.at_s, f"i{change.instance}") for change in changes if change.up],
    )
    simulate(records_of(asked), system, replicas, settings, journal=out)
    return decisions(live), decisions(out.getvalue().splitlines()[1:])


@pytest.mark.parametrize(
    "name",
    [
        *("arrow", "arrow-v1", "static", "minimal-load", "colocated", "static+sjf", "static+length-aware"),
        "colocated+held-sjf",
    ],
)
@pytest.mark.parametrize("changes", [[], CHANGES], ids=["steady", "deaths"])
def test_both_drivers_decide_alike(name: str, changes: list[Change], monkeypatch: pytest.MonkeyPatch) -> None:
    live, simulated = both(make_system(name, slo=SLO, tick_s=0.25), script(7, 160), changes, monkeypatch)
    assert_alike(live, simulated)


def test_held_requests_are_placed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    system = make_system("arrow+edf", slo=SLO, tick_s=0.25)
    held = replace(system, prefill=HoldWhenBusy(system.prefill, 3))
    live, simulated = both(held, script(11, 120), CHANGES, monkeypatch)
    assert any(("hold", "busy") in row[2] for row in live if row[1] == "place_prefill")
    assert_alike(live, simulated)


@pytest.mark.parametrize("name", ["arrow", "static", "colocated"])
def test_both_drivers_refuse_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [replace(one, at_s=one.at_s / 8) for one in script(5, 200)]
    system = make_system(name, slo=SLO, tick_s=0.25)
    live, simulated = both(system, asked, [], monkeypatch, admission=1.0)
    refused = sum("reject" in dict(row[2]) for row in live if row[1] == "place_prefill")
    assert 10 < refused < 190
    assert_alike(live, simulated)


@pytest.mark.parametrize("changes", [[], CHANGES], ids=["steady", "deaths"])
@pytest.mark.parametrize("system", [make_system("static", slo=SLO), anywhere(3)], ids=lambda each: each.name)
def test_sessions_are_kept_alike(
    system: System, changes: list[Change], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, simulated = both(system, conversations(17, 14, 6), changes, monkeypatch)
    reads = sum("read_from" in dict(row[2]) for row in live if row[1] == "place_prefill")
    assert reads >= 4
    assert_alike(live, simulated)


def assert_alike(live: list[tuple[Any, ...]], simulated: list[tuple[Any, ...]]) -> None:
    for ours, theirs in zip(live, simulated, strict=False):
        assert ours[:-1] == theirs[:-1]
        assert ours[-1] == pytest.approx(theirs[-1], abs=2e-6)
    assert len(live) == len(simulated)


def test_a_live_journals_inputs_give_its_decisions_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system = make_system("arrow+edf", slo=SLO, tick_s=0.25)
    replicas = replicas_of(packaged_profile("h100_sxm/llama-3.1-8b"), INSTANCES)
    live: list[bytes] = []
    gateway = VirtualGateway(
        system, replicas, system.order, live, SLO, FRONT_S, monkeypatch, journal_inputs=True
    )
    gateway.play(script(3, 120), CHANGES)
    roles = gateway.dispatcher.plane.membership.labels
    header: list[bytes] = []
    JournalWriter(header.append).header(version="", system=system.name, slo=SLO, roles=roles.items())
    path = tmp_path / "live.jsonl"
    path.write_bytes(b"".join(header + live))
    kept = [line for line in live if line.split(b'"')[3] not in (b"input", b"outcome")]
    assert len(kept) > 200 and any(b'"failure"' in line for line in kept)
    assert decide_again(path, system) == kept
    path.write_bytes(b"".join(header + kept))
    with pytest.raises(TraceError, match="no 'input' lines"):
        decide_again(path, system)
