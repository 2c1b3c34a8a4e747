"""Targets of the SLO classes that a workload names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.workloads.trace import Workload


def targets_by_class(workloads: Iterable[Workload], given: Mapping[str, Slo], default: Slo) -> dict[str, Slo]:
    """Return the targets of each class of the workloads: those ``given``, else the ``default``.

    Raises ConfigError for a class that no request has.
    """
    columns = (workload.slo_class for workload in workloads)
    known = sorted(
        {name for column in columns if column is not None for name in set(column.tolist()) if name}
    )
    problems = []
    for name in sorted(given.keys() - set(known)):
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        has = f"it has {', '.join(known)}" if known else "it has none"
        problems.append(f"SLO class {name!r}: the trace has no such class; {hint}{has}")
    if problems:
        raise ConfigError(problems)
    return {name: given.get(name, default) for name in known}
