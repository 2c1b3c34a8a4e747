"""A kept result is found again only while all code that it depends on is the same."""

from __future__ import annotations

import grimp

from tidegate.experiments.setting import DECIDING_ROOMS

RUNS = (
    "tidegate.sim.loop",
    "tidegate.bound.limit",
    "tidegate.measure.summary",
    "tidegate.measure.run_view",
)


def test_every_room_that_a_run_imports_is_part_of_its_name() -> None:
    graph = grimp.build_graph("tidegate")
    # The version of the package is read here and there; what the package offers decides nothing.
    graph.remove_import(importer="tidegate", imported="tidegate.api")
    modules = {module for run in RUNS for module in graph.find_upstream_modules(run)}
    rooms = {module.split(".")[1] for module in modules | set(RUNS) if "." in module}
    assert rooms > {"sim", "bound"}
    assert rooms <= set(DECIDING_ROOMS)
