"""Engine instances and the labels they carry."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.IntEnum):
    """The label of an instance. A flip rewrites it and nothing else."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2

    @property
    def label(self) -> str:
        """The lower-case name used in journals, metrics and the command line."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Instance:
    """One engine replica as the control plane knows it; fixed while the replica is up.

    ``kv_capacity_tokens`` is what its KV cache holds. A replica that is not ``flippable`` keeps
    the role it came up with. One that ``extends_kv`` can begin a prefill with another instance's KV of the
    prompt's beginning. ``step_tokens`` is its budget of every step, prompts and decodes together; 0 where it
    is unknown or chosen anew for each.
    """

    id: str
    kv_capacity_tokens: int
    max_model_len: int
    block_tokens: int = 16
    kv_bytes_per_token: int = 0
    flippable: bool = True
    extends_kv: bool = True
    step_tokens: int = 0
