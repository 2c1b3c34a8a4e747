"""An instance's profile: its four latency models, with where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import ConfigError
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, TransferCost, Values, attention_work

Form = TypeVar("Form", PrefillCost, StepCost, MixedCost, TransferCost)


@dataclass(frozen=True, slots=True)
class Profile:
    """The latency models of one instance, in seconds.

    ``name`` is ``gpu/model[/tpN]``; ``source`` says how the coefficients came to be (measured on this
    instance, packaged, derived). ``errors`` holds the fit's median and 95th percentile relative error
    per form. ``front_s`` is what passes per request outside the engine's steps; the forms do not hold it.
    """

    name: str
    prefill: PrefillCost
    step: StepCost
    mixed: MixedCost
    transfer: TransferCost
    source: str = ""
    errors: tuple[tuple[str, float, float], ...] = ()
    front_s: float = 0.0

    def prefill_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        """Return the predicted seconds to prefill one prompt alone."""
        return float(self.prefill.seconds(new_tokens, attention_work(new_tokens, cached_tokens)))

    def scaled(self, prefill: float, step: float) -> Profile:
        """Return it with prefills that take ``prefill`` times as long, and decode steps ``step`` times."""
        p, s, m = self.prefill, self.step, self.mixed
        return replace(
            self,
            prefill=replace(p, a_s=prefill * p.a_s, b_s=prefill * p.b_s, c_s=prefill * p.c_s),
            step=replace(s, a_s=step * s.a_s, b_s=step * s.b_s, c_s=step * s.c_s, e_s=step * s.e_s),
            mixed=replace(m, a_s=prefill * m.a_s, b_s=prefill * m.b_s, c_s=prefill * m.c_s, d_s=step * m.d_s),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a plain object that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """Build a profile. Raises ConfigError naming a missing or unknown coefficient."""
        try:
            return cls(
                name=str(data["name"]),
                prefill=PrefillCost(**data["prefill"]),
                step=StepCost(**data["step"]),
                mixed=MixedCost(**data["mixed"]),
                transfer=TransferCost(**data["transfer"]),
                source=str(data.get("source", "")),
                errors=tuple((str(f), float(p50), float(p95)) for f, p50, p95 in data.get("errors", ())),
                front_s=float(data.get("front_s", 0.0)),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"profile {data.get('name', '?')!r} is incomplete: {error}") from None


UNMEASURED = Profile(
    "unmeasured",
    PrefillCost(0.01, 1e-4, 1e-9),
    StepCost(0.01, 1e-5, 1e-8),
    MixedCost(0.01, 1e-4, 1e-9, 2e-8),
    TransferCost(0.001, 1e9),
    source="placeholder for an instance nobody measured; systems that need profiles refuse it",
)
"""Tells long prefills from short ones where nothing was measured: what it says is no time."""


@dataclass(frozen=True, slots=True)
class ProfileTable:
    """The profiles of several instances as arrays, so that one call prices all of them.

    A coefficient that is equal everywhere stays a float, which is what keeps pricing a uniform fleet cheap.
    ``rows`` holds one table of floats per instance; it is empty where all have the same profile.
    """

    prefill: PrefillCost
    step: StepCost
    mixed: MixedCost
    transfer: TransferCost
    rows: tuple[ProfileTable, ...] = ()

    @classmethod
    def of(cls, profiles: Sequence[Profile]) -> ProfileTable:
        """Stack ``profiles``; entry i of every coefficient array belongs to ``profiles[i]``."""
        rows = tuple(cls(p.prefill, p.step, p.mixed, p.transfer) for p in profiles)
        return cls(
            prefill=_stack([p.prefill for p in profiles], PrefillCost),
            step=_stack([p.step for p in profiles], StepCost),
            mixed=_stack([p.mixed for p in profiles], MixedCost),
            transfer=_stack([p.transfer for p in profiles], TransferCost),
            rows=() if all(row == rows[0] for row in rows) else rows,
        )

    def at(self, index: int) -> ProfileTable:
        """Return the table of one instance: every coefficient is a float."""
        return self.rows[index] if self.rows else self

    def only(self, keep: NDArray[np.bool_]) -> ProfileTable:
        """Return the table of the instances where ``keep`` is true."""
        rows = tuple(row for row, kept in zip(self.rows, keep.tolist(), strict=False) if kept)
        forms = pick(self.prefill, keep), pick(self.step, keep), pick(self.mixed, keep)
        return ProfileTable(*forms, pick(self.transfer, keep), rows)


def pick(form: Form, at: Any) -> Form:
    """Return the form of some instances: what indexing each coefficient array by ``at`` gives."""
    arrays = {name: value for name in form.__slots__ if isinstance(value := getattr(form, name), np.ndarray)}
    return replace(form, **{name: value[at] for name, value in arrays.items()}) if arrays else form


def _stack(rows: Sequence[Form], kind: type[Form]) -> Form:
    return kind(**{f.name: _column([getattr(row, f.name) for row in rows]) for f in fields(kind)})


def _column(values: list[float]) -> float | Values:
    if values and all(value == values[0] for value in values):
        return float(values[0])
    return np.array(values, dtype=np.float64)
