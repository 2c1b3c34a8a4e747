"""Keep stock vLLM responsive on a few CPU cores: for tests only.

Python imports this file when PYTHONPATH names its folder. No file of vLLM or NIXL is changed, and nothing
that they compute. Three things are set as they are imported:

- NIXL's Python binding gives its progress thread no pause between two polls, so that every server
  keeps a whole core busy while it does nothing. Here the thread pauses for a millisecond; a pull of some
  megabytes still takes milliseconds.
- vLLM's queue between its processes spins on ``os.sched_yield`` for a second after every message. Where
  another process wants the core, a kernel that takes the rest of the time slice away on a yield lets the
  spinning process starve for tens of seconds. Here a yield is a sleep of a tenth of a millisecond.
- With ``VLLM_CPU_SHIM_ACCELERATOR=1``: MooncakeConnector asks PyTorch for the current accelerator, which a
  build for CPUs answers with an error. Here the answer is device 0, and its TCP transport makes no use of it.

A GPU server needs none of this: it has cores to spare and an accelerator.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

PROGRESS_PAUSE_US = 1000
YIELD_S = 1e-4


class AfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules of ``changes`` where they are, and applies the change of each after its import."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes
        self._finding: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._changes or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.remove(fullname)
        if spec is not None and spec.loader is not None:
            self._change_after(spec.loader, self._changes[fullname])
        return spec

    def _change_after(self, loader: Any, change: Callable[[ModuleType], None]) -> None:
        execute = loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        loader.exec_module = execute_and_change


def pause_progress_threads(bindings: Any) -> None:
    """Make every NIXL agent pause between two polls."""
    make_agent = bindings.nixlAgent

    def make_pausing_agent(name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_PAUSE_US
        return make_agent(name, config)

    bindings.nixlAgent = make_pausing_agent


def pretend_device_0(accelerator: Any) -> None:
    """Answer the question for the current accelerator on a machine without one."""
    accelerator.current_device_index = lambda: 0


changes: dict[str, Callable[[ModuleType], None]] = {
    "nixl_cu12._bindings": pause_progress_threads,
    "nixl_cu13._bindings": pause_progress_threads,
}
if os.environ.get("VLLM_CPU_SHIM_ACCELERATOR") == "1":
    changes["torch.accelerator"] = pretend_device_0
sys.meta_path.insert(0, AfterImport(changes))
if hasattr(os, "sched_yield"):
    os.sched_yield = lambda: time.sleep(YIELD_S)
