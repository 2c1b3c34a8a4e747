"""Which GPUs of this machine an engine process may use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tidegate.core.errors import SetupError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """Return the NVIDIA GPUs, in words for CUDA_VISIBLE_DEVICES: those it names, else all there are."""
    named = environment.get(VISIBLE)
    if named is not None:
        return [word for word in named.replace(" ", "").split(",") if word not in ("", "-1")]
    if not devices.is_dir():
        return []
    count = sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in devices.iterdir())
    return [str(index) for index in range(count)]


def share_out(gpus: list[str], instances: int, each: int) -> list[str]:
    """Return a value of CUDA_VISIBLE_DEVICES for each instance: ``each`` GPUs, none of them twice.

    Raises SetupError when there are not enough.
    """
    if len(gpus) < instances * each:
        raise SetupError(
            f"{instances} instances with {each} GPU{'s' * (each > 1)} each need {instances * each}, and "
            f"{len(gpus)} can be seen; take fewer --instances ({VISIBLE}= in the environment starts them "
            "without any)"
        )
    return [",".join(gpus[first : first + each]) for first in range(0, instances * each, each)]
