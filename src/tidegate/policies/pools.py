"""Arrow's four pools, derived from labels and residents."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Mask, Snapshot


@dataclass(frozen=True, slots=True)
class Pools:
    """The four pools: a label, and whether work of the other phase is still on the instance.

    Derived anew from each snapshot, so an instance settles by itself when the other phase's work ends.
    MIXED instances belong to ``prefill`` and ``decode`` both.
    """

    prefill: Mask
    decode: Mask
    prefill_to_decode: Mask
    decode_to_prefill: Mask

    @classmethod
    def of(cls, snapshot: Snapshot) -> Pools:
        """Sort the instances of ``snapshot``."""
        prefills, decodes = snapshot.labelled(Role.PREFILL), snapshot.labelled(Role.DECODE)
        mixed = snapshot.labelled(Role.MIXED)
        has_prefill, has_decode = snapshot.prefill_requests > 0, snapshot.decode_requests > 0
        return cls(
            prefill=mixed | (prefills & ~has_decode),
            decode=mixed | (decodes & ~has_prefill),
            prefill_to_decode=decodes & has_prefill,
            decode_to_prefill=prefills & has_decode,
        )

    def name_of(self, at: int) -> str:
        """Return the pool of the instance at index ``at`` as people write it; ``mixed`` for a MIXED one."""
        if self.prefill[at] and self.decode[at]:
            return "mixed"
        if self.prefill_to_decode[at]:
            return "prefill->decode"
        if self.decode_to_prefill[at]:
            return "decode->prefill"
        return "prefill" if self.prefill[at] else "decode"
