"""Instances that a controller starts, drains and stops in the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from tests.sim.test_sim_features import fleet, many
from tidegate.core.decision import Action, AddInstance, ControlDecision, Drain, SetTarget, Undrain
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Signal
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system


@dataclass(frozen=True)
class Scripted:
    """Takes the actions of ``script`` one after the other, one entry per decision."""

    script: Sequence[tuple[Action, ...]]
    period_s: float = 0.2
    name: str = "scripted"
    needs: frozenset[Signal] = frozenset()

    def initial(self) -> int:
        return 0

    def decide(self, snapshot: Snapshot, turn: int) -> ControlDecision[int]:
        return ControlDecision(turn + 1, self.script[turn] if turn < len(self.script) else ())


def test_a_spare_joins_after_its_start_delay_and_a_drained_instance_leaves_empty() -> None:
    script: list[tuple[Action, ...]] = [
        (AddInstance(Role.DECODE, "peak"),),
        (),
        (),
        (Drain("i1", remove=True, reason="quiet"),),
    ]
    system = replace(make_system("static"), controllers=(Scripted(script),), window_s=0.2)
    records = many(80, 0.03)
    run = simulate(records, system, fleet(4), SimSettings(spares=1, start_delay_s=0.2))
    assert run.outcomes == {"ok": 80}
    assert run.requests.output_tokens.tolist() == [record.output_tokens for record in records]
    late, left = run.instances[3], run.instances[1]
    assert (late.first_role, late.up_s) == ("decode", pytest.approx(run.end_s - 0.5))
    assert 0.8 <= left.up_s < run.end_s
    assert (run.requests.decode_on == 3).any(), "the instance that joined decodes"


def test_a_drain_outlasts_a_death_and_a_return() -> None:
    records = many(80, 0.03)
    settings = SimSettings(deaths=[(0.5, "i1")], returns=[(0.9, "i1")])

    def last_prefill_on_i1(*later: tuple[Action, ...]) -> int:
        script = [(Drain("i1"),), *[()] * 5, *later]
        system = replace(make_system("colocated"), controllers=(Scripted(script),), window_s=0.2)
        run = simulate(records, system, fleet(4), settings)
        assert run.outcomes == {"ok": 80}
        return int((run.requests.prefill_on == 1).nonzero()[0].max(initial=-1))

    assert last_prefill_on_i1() < 10
    assert last_prefill_on_i1((Undrain("i1"),)) > 60


def test_a_target_starts_what_flips_cannot_make_up_for() -> None:
    system = replace(
        make_system("static", split=(1, 1)), controllers=(Scripted([(SetTarget(1, 2),)]),), window_s=0.2
    )
    run = simulate(many(40, 0.03), system, fleet(3), SimSettings(spares=1, start_delay_s=0.1))
    assert [use.first_role for use in run.instances] == ["prefill", "decode", "decode"]
    assert run.outcomes == {"ok": 40}


def test_without_a_spare_nothing_starts() -> None:
    system = replace(
        make_system("static"), controllers=(Scripted([(AddInstance(Role.DECODE),)]),), window_s=0.2
    )
    run = simulate(many(20, 0.03), system, fleet(2))
    assert len(run.instances) == 2 and run.outcomes == {"ok": 20}
    (warning,) = run.warnings
    assert warning.startswith("a controller asked for one more instance at 0.2 s")


def test_an_instance_returns_and_serves_again() -> None:
    settings = SimSettings(deaths=[(0.2, "i1")], returns=[(0.5, "i1")])
    run = simulate(many(80, 0.03), make_system("static"), fleet(4), settings)
    assert run.outcomes == {"ok": 80}
    assert run.instances[1].up_s == pytest.approx(run.end_s - 0.3)


@pytest.mark.parametrize(
    "settings",
    [{"returns": [(1.0, "i0")]}, {"deaths": [(1.0, "i0"), (2.0, "i0")]}, {"spares": 2}, {"spares": -1}],
)
def test_a_membership_that_cannot_be(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        simulate([], make_system("static"), fleet(2), SimSettings(**settings))  # type: ignore[arg-type]
