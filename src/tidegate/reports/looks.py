"""How a system looks: the same tone and dashes in every chart of every report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from zlib import crc32

TONES = ("#0072B2", "#D55E00", "#008F68", "#C2578F", "#B07A00", "#3A9BD9", "#444444", "#7F7F7F")
"""After Okabe and Ito 2008, darkened to be seen on white, in the order of most contrast."""
DARK_TONES = ("#4EA8E0", "#FF8A3D", "#2CC99B", "#E39AC4", "#F0B429", "#A5DAF8", "#E6E6E6", "#9A9A9A")
"""The same on a dark page."""
DASHES: tuple[tuple[int, ...], ...] = ((), (7, 3), (2, 2), (10, 3, 2, 3), (5, 2, 2, 2, 2, 2), (14, 4))
KNOWN_TONES = {
    "tidegate": 0, "arrow-lending": 1, "static:best": 2, "static": 2, "colocated": 3, "colocated:tuned": 3,
    "arrow": 4, "static:even": 5, "arrow-v1": 6, "round-robin": 6, "minimal-load": 7,
}  # fmt: skip
ORDER_DASHES = {"": 0, "fifo": 0, "feasible-first": 1, "edf": 2, "sjf": 3}
ROLE_TONES = {"prefill": 4, "decode": 0, "mixed": 2}
STAGE_TONES = {
    "queue": 1, "prefill": 4, "other": 6, "transfer": 3, "decode_queue": 7, "first_step": 5, "decode": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Look:
    """A system's tone, as an index of ``TONES``, and its dashes, as lengths of lines and gaps."""

    tone: int
    dash: tuple[int, ...] = ()


def looks(systems: Sequence[str]) -> dict[str, Look]:
    """Return a look per system that follows from its name alone; one that is taken already becomes the next.

    An order changes the dashes and keeps the tone.
    """
    free = [Look(tone, dash) for dash, tone in product(DASHES, range(len(TONES)))]
    found: dict[str, Look] = {}
    for system in systems:
        base, _, order = system.partition("+")
        tone = KNOWN_TONES.get(base, crc32(base.encode()) % len(TONES))
        dash = ORDER_DASHES.get(order, 4)
        wanted = [Look(tone, DASHES[(dash + step) % len(DASHES)]) for step in range(len(DASHES))]
        look = next((each for each in [*wanted, *free] if each not in found.values()), wanted[0])
        found[system] = look
    return found
