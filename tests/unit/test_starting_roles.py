"""Labels at start-up, and the label of a late joiner."""

from __future__ import annotations

import pytest

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.policies.starting_roles import SplitRoles, even_roles, joining_role, mixed_roles
from tidegate_testing import cluster

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def test_even_roles_give_the_odd_one_to_decode() -> None:
    assert even_roles(1) == (P,)
    for instances in range(2, 20):
        roles = even_roles(instances)
        assert roles.count(P) == instances // 2
        assert roles.count(D) == instances - instances // 2


def test_every_prefix_of_the_even_sequence_is_even() -> None:
    assert all(even_roles(9)[:n] == even_roles(n) for n in range(1, 10))


def test_a_split_fits_its_fleet_only() -> None:
    assert SplitRoles(2, 1)(3) == (P, P, D)
    with pytest.raises(ConfigError, match="split 2:1 needs 3 instances, the fleet has 4"):
        SplitRoles(2, 1)(4)


@pytest.mark.parametrize("split", [(0, 2), (2, 0), (-1, 3)])
def test_a_split_has_both_sides(split: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        SplitRoles(*split)


def test_a_fleet_needs_an_instance() -> None:
    for roles in (even_roles, mixed_roles):
        with pytest.raises(ConfigError):
            roles(0)


def test_a_joiner_takes_the_label_that_is_missing_most() -> None:
    assert joining_role(even_roles, cluster(1, roles=(P,)).snapshot(0.0), 2) == D
    assert joining_role(even_roles, cluster(3, roles=(D, D, D)).snapshot(0.0), 4) == P
    assert joining_role(SplitRoles(2, 1), cluster(2, roles=(P, D)).snapshot(0.0), 3) == P
    assert joining_role(mixed_roles, cluster(2, roles=(M, M)).snapshot(0.0), 3) == M


def test_those_that_start_count_as_members() -> None:
    pair = cluster(2, roles=(P, D)).snapshot(0.0)
    assert joining_role(even_roles, pair, 2) == D
    assert joining_role(even_roles, pair, 2, starting=[D]) == P
    assert joining_role(SplitRoles(1, 1), pair, 2, starting=[P]) == D


def test_a_joiner_of_a_fixed_split_counts_those_that_are_down() -> None:
    assert joining_role(SplitRoles(3, 1), cluster(2, roles=(P, P)).snapshot(0.0), 4) == D
    assert joining_role(SplitRoles(1, 3), cluster(2, roles=(P, D)).snapshot(0.0), 4) == D


def test_a_joiner_of_an_outgrown_split_takes_the_label_with_the_fewest_members() -> None:
    assert joining_role(SplitRoles(2, 1), cluster(3, roles=(P, P, D)).snapshot(0.0), 3) == D


def test_at_a_tie_a_joiner_keeps_the_label_that_it_had() -> None:
    whole = cluster(2, roles=(P, D)).snapshot(0.0)
    assert joining_role(SplitRoles(1, 1), whole, 2, last=P) == P
    assert joining_role(SplitRoles(1, 1), whole, 2, last=D) == D
