"""tidegate: an adaptive control plane for prefill/decode disaggregated LLM serving.

The Python API (``docs/api.md``) is imported when it is first used, so that ``import tidegate`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidegate.api import ComparisonResult, SimulationResult, compare, list_systems, load_trace, simulate

__version__ = "0.1.0"
__all__ = [
    "ComparisonResult",
    "SimulationResult",
    "__version__",
    "compare",
    "list_systems",
    "load_trace",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("tidegate.api"), name)
    raise AttributeError(f"module 'tidegate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
