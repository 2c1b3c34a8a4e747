"""Sessions in the control plane: bound, moved, expired, evicted, lost, and never another tenant's."""

from __future__ import annotations

from dataclasses import dataclass, field

import orjson
import pytest

from tests.control.plane_harness import only
from tidegate.control.effects import RunDecode, RunPrefill
from tidegate.control.live_request import LiveRequest
from tidegate.control.plane import ControlPlane
from tidegate.core.decision import Migrate, Path, Place, Verdict
from tidegate.core.request import Request
from tidegate.core.session import History
from tidegate.core.slo import Slo
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import ReadBack, Signal
from tidegate.policies.reading import read_where_worth
from tidegate.policies.starting_roles import mixed_roles
from tidegate.signals.prefix import PrefixIndex, PromptBlocks
from tidegate.systems.system import System
from tidegate_testing import REFERENCE, instance

BLOCK = 100
ANSWER = 10


class Turn(LiveRequest):
    """A turn whose prompt is named by ``keys``, a block each, and its answer by ``answer``."""

    def __init__(
        self,
        name: str,
        keys: tuple[int, ...],
        session: str = "s",
        tenant: str = "a",
        answer: tuple[int, ...] = (),
        *,
        with_answer: bool = True,
    ) -> None:
        super().__init__(name, 600.0, PromptBlocks(keys, BLOCK, with_answer=with_answer))
        self.answer = answer
        self.request = Request(
            name, BLOCK * len(keys) + 1, ANSWER, 0.0, Slo(1.0, 0.1), tenant=tenant, session=session
        )

    def as_request(self) -> Request:
        return self.request


@dataclass
class Told:
    """Prefills on ``prefill_on``, decodes on ``decode_on``; keeps what it was asked."""

    prefill_on: str = "i0"
    decode_on: str = "i1"
    asked: list[Request] = field(default_factory=list)
    needs: frozenset[Signal] = frozenset({Signal.HISTORY})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        self.asked.append(request)
        return Verdict(Place(self.prefill_on, None, Path.DISAGGREGATED))

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        self.asked.append(request)
        return Verdict(Place(prefill_on, self.decode_on, Path.DISAGGREGATED))


@dataclass
class Case:
    told: Told
    plane: ControlPlane
    lines: list[bytes]

    def play(self, turn: Turn, now: float) -> RunPrefill:
        """Serve a turn whole, in a second."""
        run = self.begin(turn, now)
        self.end(turn, now + 1.0)
        return run

    def begin(self, turn: Turn, now: float) -> RunPrefill:
        run: RunPrefill
        (run,) = only(self.plane.arrive(turn, now), RunPrefill)
        (_,) = only(self.plane.prefill_done(turn, now), RunDecode)
        return run

    def end(self, turn: Turn, now: float) -> None:
        self.plane.tokens(turn, max(ANSWER, BLOCK * len(turn.answer)), now)
        turn.blocks = turn.blocks._replace(keys=(*turn.blocks.keys, *turn.answer))
        self.plane.ended(turn, None, now)

    def history(self, turn: Turn, now: float) -> History | None:
        """Return what a turn that is not served any further finds."""
        self.begin(turn, now)
        return self.told.asked[-2].history

    @property
    def events(self) -> list[tuple[str, str, int]]:
        rows = [orjson.loads(line) for line in self.lines]
        return [
            (row["event"], row.get("instance", ""), row.get("tokens", 0))
            for row in rows
            if row["type"] == "session"
        ]


@pytest.fixture
def case() -> Case:
    return make_case()


def make_case(read_back: ReadBack | None = read_where_worth, kv_tokens: int = 100_000) -> Case:
    told, lines = Told(), list[bytes]()
    system = System(name="t", summary="", roles=mixed_roles, prefill=told, decode=told, read_back=read_back)
    journal = JournalWriter(lines.append)
    plane = ControlPlane(system, ["i0", "i1", "i2"], journal, prefixes=PrefixIndex())
    for name in ("i0", "i1", "i2"):
        plane.instance_up(instance(name, kv_capacity_tokens=kv_tokens), REFERENCE, 0.0)
    plane.start(0.0)
    return Case(told, plane, lines)


KEYS = tuple(range(1, 40))


def test_a_later_turn_finds_where_the_last_one_was_decoded(case: Case) -> None:
    first = case.play(Turn("r0", KEYS[:20]), 0.0)
    assert first.place.read_from is None and case.told.asked[0].history is None
    second = Turn("r1", KEYS[:30])
    run = case.begin(second, 2.0)
    assert case.told.asked[-2].history == case.told.asked[-1].history == History("i1", 2000)
    assert case.told.asked[-2].cached == {"i0": 2000, "i1": 2000}
    assert run.place.read_from is None, "i0 prefilled it itself"
    case.end(second, 3.0)
    case.told.prefill_on = "i2"
    assert case.begin(Turn("r2", KEYS[:35]), 4.0).place.read_from == "i1"
    assert case.events == [("bound", "i1", 2011)]
    rows = [orjson.loads(line) for line in case.lines if b'"r2"' in line]
    assert rows[0]["chosen"]["read_from"] == "i1" and rows[0]["history"] == {"on": "i1", "tokens": 3000}


def test_a_placements_own_reading_stands_where_the_system_asks_nobody() -> None:
    case = make_case(read_back=None)
    case.play(Turn("r0", KEYS[:20]), 0.0)
    case.told.prefill_on = "i2"
    assert case.begin(Turn("r1", KEYS[:30]), 2.0).place.read_from is None


def test_tenants_share_nothing(case: Case) -> None:
    case.play(Turn("r0", KEYS[:20], tenant="a"), 0.0)
    assert case.history(Turn("r1", KEYS[:30], tenant="b"), 2.0) is None


def test_a_contradicting_turn_keeps_what_it_has_in_common(case: Case) -> None:
    case.play(Turn("r0", KEYS[:20]), 0.0)
    assert case.history(Turn("r1", (*KEYS[:12], 99, 98, 97)), 2.0) == History("i1", 1200)
    assert case.events[-1] == ("shortened", "i1", 1200)
    case = make_case()
    case.play(Turn("r0", KEYS[:20]), 0.0)
    assert case.history(Turn("r1", (99, 98, 97)), 2.0) is None


def test_turns_in_flight_at_once_find_what_has_ended(case: Case) -> None:
    case.play(Turn("r0", KEYS[:20]), 0.0)
    one, other = Turn("r1", (*KEYS[:20], 50, 51)), Turn("r2", (*KEYS[:20], 60))
    case.begin(one, 2.0)
    assert case.history(other, 2.1) == History("i1", 2000)
    assert case.events[-1] == ("overlaps", "i1", 2000)
    case.end(one, 3.0)
    case.told.decode_on = "i2"
    assert case.history(Turn("r3", (*KEYS[:20], 50, 51, 52)), 3.5) == History("i1", 2200)
    case.end(other, 4.0)
    assert case.history(Turn("r4", (*KEYS[:20], 50, 51, 52)), 5.0) == History("i1", 2000)


def test_a_session_is_lost_with_its_instance_and_rebuilt(case: Case) -> None:
    case.play(Turn("r0", KEYS[:20]), 0.0)
    case.plane.instance_down("i1", "died", 1.5)
    case.told.decode_on = "i2"
    again = Turn("r1", KEYS[:30])
    assert case.history(again, 2.0) is None
    case.plane.prefill_reported(again, 0, 2.5)
    case.end(again, 3.0)
    assert case.events == [
        ("bound", "i1", 2011),
        ("lost", "i1", 2011),
        ("rebuilt", "", 2000),
        ("bound", "i2", 3011),
    ]
    assert (case.plane.sessions.told_tokens, case.plane.sessions.computed_again_tokens) == (2000, 2000)


def test_a_session_moves_with_its_request(case: Case) -> None:
    case.play(Turn("r0", KEYS[:20]), 0.0)
    second = Turn("r1", KEYS[:30])
    case.begin(second, 2.0)
    case.plane.act([Migrate("r1", "i1", "i2")], 2.1)
    case.plane.migration_begun(second, 2.1)
    case.plane.migration_done(second, 3003, 2.2)
    assert case.events[-1] == ("moved", "i2", 2011)
    case.end(second, 3.0)
    assert case.history(Turn("r2", KEYS[:35]), 4.0) == History("i2", 3000)
    assert [event for event, _, _ in case.events] == ["bound", "moved"]


def test_a_session_expires_by_what_clients_take_to_think(case: Case) -> None:
    now, count = 0.0, 3
    case.play(Turn("r0", KEYS[:2]), now)
    for number in range(1, 25):  # pauses of ten minutes
        now, count = now + 601.0, count + 1
        case.play(Turn(f"r{number}", tuple(range(1, count))), now)
    case.plane.tick(now + 1100.0)
    assert case.events[-1][0] == "bound", "as long as that may well be"
    case.plane.tick(now + 1700.0)
    assert case.events[-1] == ("expired", "i1", 100 * (count - 1) + 11)
    assert case.history(Turn("last", tuple(range(1, 40))), now + 1800.0) is None


def test_where_room_is_short_the_cheapest_to_rebuild_goes() -> None:
    case = make_case(kv_tokens=6000)
    case.play(Turn("r0", KEYS[:30], session="long"), 0.0)
    case.play(Turn("r1", tuple(range(100, 110)), session="short"), 0.0)
    case.plane.tick(2.0)
    assert [event for event, _, _ in case.events] == ["bound", "bound"]
    case.begin(Turn("r2", tuple(range(200, 225)), session=""), 2.5)
    case.plane.tick(4.0)
    assert case.events[-1] == ("evicted", "i1", 1011)
    assert case.plane.snapshot(4.0).sessions.held_on.tolist()[:2] == [1, -1]


def test_a_conversation_without_a_name_is_known_by_its_newest_answer(case: Case) -> None:
    case.play(Turn("r0", KEYS[:20], session="", answer=(50,)), 0.0)
    case.play(Turn("r1", (*KEYS[:20], 50, 70), session="", answer=(71,)), 2.0)
    case.play(Turn("r2", tuple(range(300, 310)), session=""), 3.0)
    assert case.history(Turn("r3", (*KEYS[:20], 50, 70, 71, 72), session=""), 5.0) == History("i1", 2300)
    assert case.told.asked[-2].session == "~r0"
    for other in (KEYS[:20], (*KEYS[:20], 50, 70), (*KEYS[:20], 80, 81)):  # all that is common is no answer
        assert case.history(Turn(f"r{other}", other, session=""), 6.0) is None
    assert case.history(Turn("r4", (*KEYS[:20], 50, 70, 71), session="", tenant="b"), 7.0) is None


def text(name: str, keys: tuple[int, ...], tenant: str = "a") -> Turn:
    """Return a turn that comes as text: nothing names its answer."""
    return Turn(name, keys, tenant=tenant, with_answer=False)


def test_how_much_of_a_retold_answer_is_found_is_learnt(case: Case) -> None:
    case.told.prefill_on = "i1"
    case.play(text("r0", KEYS[:20]), 0.0)
    second = text("r1", KEYS[:24])
    case.begin(second, 2.0)
    assert case.told.asked[-2].history == History("i1", 2010), "all that has KV, as nothing else is known"
    assert case.told.asked[-2].cached == {"i1": 2000}, "engines find whole blocks"
    case.plane.prefill_reported(second, 1984, 2.5, shared_tokens=2004)
    case.end(second, 3.0)
    assert case.plane.sessions.told_tokens == 2004
    assert case.history(text("r2", KEYS[:28]), 4.0) == History("i1", 2401 + 3), "a third of nine"


def test_a_turn_that_contradicts_its_session_teaches_nothing_of_answers(case: Case) -> None:
    case.play(text("r0", KEYS[:20]), 0.0)
    other = text("r1", (*KEYS[:12], 99, 98, 97, 96, 95, 94, 93, 92, 91))
    case.begin(other, 2.0)
    case.plane.prefill_reported(other, 1200, 2.5, shared_tokens=1200)
    case.end(other, 3.0)
    assert case.history(text("r2", (*other.blocks.keys, 90)), 4.0) == History("i1", 2110)
